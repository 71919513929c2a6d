"""Layers of transformers' models that choose the keys of each query by an indexer, under sequence
parallelism.

The attention module's own forward runs, and so does the indexer's, with three things exchanged:

- The module is given a cache, `RowKeys`, through which the indexer's keys pass, where those of
  earlier tokens would be in generation. There the keys of the whole row are gathered over the
  ranks: one head, in the model's precision.
- The indexer runs for a chunk of queries of one document at a time, over the keys of that document
  (and of its parents, for a branch of a shared prompt) in their natural order: scores are [heads,
  chunk, L], never [T, T], and what `topk` is given is what it is given in one process with the
  document alone. So ties are broken alike.
- The chosen keys come to the attention function as an argument (`indices`, or `block_indices` for
  MiniMax M3), and `sparse.attention` computes them.

Where no document of the row is longer than what a query may choose, nothing is left out: the
indexer does not run, and attention is that of all other models.

No gradient reaches an indexer: in transformers it runs without one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import sparse
from .collectives import gather
from .hooks import ModelHooks
from .plan import RowPlan
from .sparse import Chosen, Stretch

LAYERS = frozenset({"indexed_attention", "deepseek_sparse_attention", "minimax_m3_sparse"})
"""Layer types that are computed here, in the models below."""

MODELS = frozenset(
    {
        "deepseek_v32",
        "glm_moe_dsa",
        "axk2",
        "hy_v4",
        "dots3_note_text",
        "mistral_large4_text",
        "minimax_m3_vl_text",
    }
)
"""Text models whose indexers are made of one key a token and a `topk`."""

SCORES = 1 << 28
"""Bytes of the scores of a chunk of queries, all heads of an indexer; those of one query at
least."""


class RowMask:
    """Stands where a mask is asked for: the plan's documents are the mask."""

    def __getitem__(self, index: Any) -> RowMask:
        return self


MASK = RowMask()


class RowKeys:
    """Stands where a cache of keys is asked for: tells the indexer the row's plan. Keys and values
    of attention pass through.
    """

    def __init__(self, plan: RowPlan) -> None:
        self.plan = plan

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


class _Keys:
    """The cache of one call of an indexer: notes the keys that it makes, and gives it others.

    Keys are [1, T, D]; those of MiniMax M3 have a dimension of heads, [1, 1, T, D].
    """

    def __init__(self, given: Tensor | None = None) -> None:
        self.given = given
        self.made: Tensor | None = None

    def update_indexer(self, keys: Tensor, *_: Any) -> Tensor:
        self.made = keys
        # A call that only makes keys compares with one.
        return keys[..., :1, :] if self.given is None else self.given

    update_index = update_indexer

    @property
    def layers(self) -> Mapping[int, _Keys]:
        return _Same(self)


class _Same(dict[int, Any]):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __getitem__(self, key: int) -> Any:
        return self.value


def prepare(model: nn.Module, hooks: ModelHooks) -> None:
    """Lets every indexer choose over the ranks."""
    for module in model.modules():
        if hasattr(module, "indexer"):
            hooks.before(module, _give_row)
            if module.indexer is not None:
                hooks.replace_forward(module.indexer, _choose)


def indexers(model: nn.Module) -> list[nn.Module]:
    """The indexers of a model."""
    found = [getattr(m, "indexer", None) for m in model.modules()]
    return [m for m in found if isinstance(m, nn.Module)]


def chosen(module: nn.Module, arguments: dict[str, Any]) -> Chosen | None:
    """Takes the chosen keys out of the arguments of an attention call; None where every key is
    seen. Those of a module that knows no indexer stay among its arguments.

    Raises:
        ValueError: the module has an indexer and gives no choice.
    """
    if not hasattr(module, "indexer"):
        return None
    indices = arguments.pop("indices", None)
    blocks = arguments.pop("block_indices", None)
    indexer: Any = module.indexer
    if blocks is not None:
        return Chosen(blocks[0], indexer.block_size) if blocks.shape[-1] else None
    if indices is not None:
        return Chosen(indices) if indices.shape[-1] else None
    if indexer is not None:
        raise ValueError(
            f"{type(module).__name__}: it has an indexer, and no chosen keys reached the attention"
            " function."
        )
    return None


def _give_row(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before an attention module with an indexer, or one that uses the choice of another's."""
    plan = kwargs.get("sp_plan", getattr(kwargs.get("position_ids"), "sp_plan", None))
    if plan is None:
        return None
    indexer: Any = getattr(module, "indexer", None)
    if kwargs.get("past_key_values") is not None:
        return None  # refused by the attention function
    given = {**kwargs, "past_key_values": RowKeys(plan)}
    if kwargs.get("attention_mask") is None and not hasattr(indexer, "block_size"):
        given["attention_mask"] = MASK
    return args, given


def _choose(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """In place of an indexer's forward. Returns positions in each query's document, [1, T/n, K]
    int32, or blocks, [1, heads, T/n, K]; K is 0 where every key is seen.
    """
    own: Callable[..., Tensor] = type(self).forward
    arguments = inspect.signature(own).bind(self, *args, **kwargs).arguments
    cache = arguments.get("past_key_values")
    if not isinstance(cache, RowKeys):
        return own(self, *args, **kwargs)
    plan = cache.plan
    del arguments["self"]
    in_blocks = hasattr(self, "block_size")
    block = int(self.block_size) if in_blocks else 1
    most = int(self.topk_blocks if in_blocks else self.index_topk)
    hidden: Tensor = arguments["hidden_states"]
    heads = (self.num_heads,) if in_blocks else ()
    longest = sparse.longest_document(plan)
    if -(-longest // block) <= most:
        return hidden.new_zeros((1, *heads, plan.local_length, 0), dtype=torch.int32)
    with torch.no_grad():
        keys = _row_keys(self, own, arguments, plan)
        width = min(most, -(-longest // block))
        shape = (1, *heads, plan.local_length, width)
        out = torch.full(shape, -1, dtype=torch.int32, device=hidden.device)
        for stretch in sparse.stretches_of(plan):
            for rows, picks in _of_stretch(self, own, arguments, stretch, keys, most, block):
                out[..., rows, : picks.shape[-1]] = picks
    return out


def _row_keys(
    self: Any, own: Callable[..., Tensor], arguments: dict[str, Any], plan: RowPlan
) -> Tensor:
    """The indexer's keys of the whole row, [T, ...]."""
    cache = _Keys()
    local = plan.local_length
    hidden = arguments["hidden_states"]
    one = torch.ones((1, local, 1), dtype=torch.bool, device=hidden.device)
    own(self, **_part(arguments, slice(0, local), None, one, cache))
    if cache.made is None:
        raise ValueError(
            f"{type(self).__name__}: its keys do not pass through a cache, and cannot be gathered."
        )
    # [1, T/n, D] or [1, 1, T/n, D] -> [T/n, D]
    return gather(cache.made.flatten(0, -3)[0].contiguous(), plan)


def _of_stretch(
    self: Any,
    own: Callable[..., Tensor],
    arguments: dict[str, Any],
    stretch: Stretch,
    keys: Tensor,
    most: int,
    block: int,
) -> Iterator[tuple[slice, Tensor]]:
    """(local rows, what they choose) of the stretch's queries."""
    device = keys.device
    if -(-(stretch.first + len(stretch)) // block) <= most:
        # No more keys than may be chosen.
        picks = torch.arange(-(-stretch.length // block), device=device, dtype=torch.int32)
        yield stretch.rows, picks[:most]
        return
    in_blocks = hasattr(self, "block_size")
    # [L, D] -> [1, L, D] or [1, 1, L, D]
    of_document = stretch.of(keys)[None, None] if in_blocks else stretch.of(keys)[None]
    heads = int(self.num_heads if in_blocks else self.n_heads)
    size = max(1, SCORES // (4 * heads * stretch.length))
    positions = torch.arange(stretch.length, device=device)
    for rows, at in stretch.chunks(size):
        mask = (positions <= positions[at, None])[None]
        yield rows, own(self, **_part(arguments, rows, positions[at], mask, _Keys(of_document)))


def _part(
    arguments: dict[str, Any], rows: slice, positions: Tensor | None, mask: Tensor, cache: _Keys
) -> dict[str, Any]:
    """The arguments of an indexer for some queries."""
    part: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "past_key_values":
            part[name] = cache
        elif name == "attention_mask":
            part[name] = mask
        elif name == "position_ids" and value is not None:
            # [1, c]; where keys alone are made, none is compared
            given = value.new_zeros((1, mask.shape[1])) if positions is None else positions[None]
            part[name] = given
        elif isinstance(value, tuple):  # cosines and sines
            part[name] = tuple(x[:, rows] for x in value)
        elif isinstance(value, Tensor):
            part[name] = value[:, rows]
        else:
            part[name] = value
    return part
