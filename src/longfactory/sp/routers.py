"""Which experts the routers of a model chose, and which keys its indexers: recorded in one pass,
replayed in another.

A router chooses by comparing numbers. Where two of them are nearly equal, two computations that
differ by rounding alone may choose different experts, and then their results are far apart although
both are right. Two passes can be compared only where they choose alike:

    with routers.record(model) as choices:  # the reference, a document of n tokens
        reference(...)
    with routers.replay(other, choices):  # the same tokens, in another precision
        other(...)
    # The row, in its natural order; a number stands for tokens that choose themselves.
    whole = routers.join([first, second, padding])
    with routers.replay(sharded, whole.take(plan.index)):
        sharded(**hf.inputs(row, plan))

A choice is whatever `topk` or `max` picks inside a router, be it experts or groups of experts, and
what `masked_fill` leaves out. What the experts themselves compute is no choice: their kernels mask
rows too, in some passes and not in others. Replayed are the places; the values there are those of
the pass at hand, with their gradients. Routers that draw at random in train mode do not draw inside
either block.

The choice of an indexer (`indexer.py`) is what it returns: positions in each query's document.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .position import start_of_chunk

_INDEXER = re.compile(r"Indexer$")
_ROUTER = re.compile(r"(Router|Gating|(?<!Forget)Gate)$")  # a forget gate is part of a recurrence
_TOPK = (torch.topk, torch.Tensor.topk)
_MAX = (torch.max, torch.Tensor.max)
_MASKED_FILL = (torch.masked_fill, torch.Tensor.masked_fill)
OWN = -1
"""In a recorded choice: this token chooses by itself."""
_state = threading.local()


@dataclasses.dataclass(frozen=True)
class Choices:
    """`of[router][i]` is [tokens, picks]: where the i-th `topk` or `max` of this router found what
    it picked, for each token, or [tokens, experts] with 1 where its `masked_fill` left one out.
    Of an indexer, [tokens, keys] that it chose, -1 for none; 0 keys where all are seen."""

    of: dict[str, list[Tensor]]

    @property
    def tokens(self) -> int | None:
        """Number of tokens; None where no router chose anything."""
        return next((len(picks) for all_picks in self.of.values() for picks in all_picks), None)

    def take(self, index: Tensor | slice) -> Choices:
        """The choices of some tokens, such as those at `plan.index`."""
        where = index if isinstance(index, slice) else index.cpu()
        return Choices(
            {name: [picks[where] for picks in all_picks] for name, all_picks in self.of.items()}
        )


def join(parts: Sequence[Choices | int]) -> Choices:
    """The choices of consecutive tokens. A number stands for as many tokens that choose by
    themselves (padding).

    Raises:
        ValueError: two parts were recorded by different routers.
    """
    recorded = [part for part in parts if isinstance(part, Choices)]
    if not recorded:
        return Choices({})
    first = recorded[0].of
    joined: dict[str, list[Tensor]] = {name: [] for name in first}
    for part in recorded:
        if {name: len(picks) for name, picks in part.of.items()} != {
            name: len(picks) for name, picks in first.items()
        }:
            raise ValueError(
                f"The choices of routers {sorted(part.of)} cannot follow those of {sorted(first)}:"
                " they are of two models."
            )
    for name, all_picks in first.items():
        for i, like in enumerate(all_picks):
            # The indexer of a short document chooses fewer keys.
            width = max(part.of[name][i].shape[1] for part in recorded)
            chunks = [
                (
                    _widened(part.of[name][i], width)
                    if isinstance(part, Choices)
                    else like.new_full((part, width), OWN)
                )
                for part in parts
            ]
            joined[name].append(torch.cat(chunks))
    return Choices(joined)


def _widened(picks: Tensor, width: int) -> Tensor:
    missing = width - picks.shape[1]
    return torch.cat([picks, picks.new_full((len(picks), missing), OWN)], 1) if missing else picks


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses experts, by the name of its class."""
    return _ROUTER.search(type(module).__name__) is not None


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by name: those whose class is called a router or gate, and
    blocks that hold experts.

    A module that holds attention too is none: attention looks for maxima of its own.
    """
    found = {}
    for name, module in model.named_modules():
        holds_experts = any(child == "experts" for child, _ in module.named_children())
        if not (is_router(module) or holds_experts):
            continue
        if not any(
            "Attention" in type(m).__name__ or "DeltaNet" in type(m).__name__
            for m in module.modules()
        ):
            found[_plain(name)] = module
    return found


def indexers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose keys, by name: those whose class is called an indexer."""
    return {
        _plain(name): module
        for name, module in model.named_modules()
        if _INDEXER.search(type(module).__name__)
    }


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Choices]:
    """Inside the block the model runs one pass over some tokens, in chunks or whole, once or
    (recomputed) more often.

    The choices are there when the block has ended.
    """
    choices = Choices({})
    chunks: dict[tuple[str, int], dict[int, Tensor]] = {}

    def seen(name: str, slot: int, start: int, places: Tensor) -> None:
        if places.shape[1] == 0:  # an indexer's, where every key is seen
            return
        at = chunks.setdefault((name, slot), {})
        # The first look at a few tokens, which some layers take, is a shorter chunk that begins
        # where a longer one does.
        if start not in at or len(at[start]) < len(places):
            at[start] = places.cpu()

    with _watched(
        model,
        lambda name, tokens: _Watch(
            lambda slot, start, places: seen(name, slot, start, places), tokens
        ),
    ):
        yield choices
    for (name, slot), at in sorted(chunks.items()):
        whole: list[Tensor] = []
        length = 0
        for start in sorted(at):
            if start + len(at[start]) <= length:
                continue
            if start != length:
                raise ValueError(
                    f"The router {name} ran over tokens {start} and on, but not over those from"
                    f" {length} to {start}."
                )
            whole.append(at[start])
            length += len(at[start])
        choices.of.setdefault(name, []).append(torch.cat(whole))
        assert len(choices.of[name]) == slot + 1


@contextlib.contextmanager
def replay(model: nn.Module, choices: Choices) -> Iterator[None]:
    """Inside the block the routers choose as recorded, in every pass over these tokens, recomputed
    ones too.

    Raises:
        ValueError: (in the pass) a router that was not recorded, or another number of tokens or
            picks.
    """
    device: dict[tuple[str, int, torch.device], Tensor] = {}

    def known(name: str, slot: int, start: int, places: Tensor) -> Tensor:
        picks = choices.of.get(name, [])
        if not picks and name in choosers:
            return places
        if slot >= len(picks):
            raise ValueError(
                f"The router {name} makes {slot + 1} choices or more a token; {len(picks)} were"
                " recorded."
            )
        key = (name, slot, places.device)
        if key not in device:
            device[key] = picks[slot].to(places.device)
        recorded = device[key][start : start + len(places)]
        if name in choosers and len(recorded) == len(places):
            # Of another width: every key is seen, here or where it was recorded.
            if recorded.shape != places.shape:
                return places
        elif recorded.shape != places.shape:
            raise ValueError(
                f"The router {name} picks {tuple(places.shape)} (tokens, places) from token {start}"
                f" on; recorded are {tuple(recorded.shape)} of {len(picks[slot])} tokens."
            )
        return torch.where(recorded == OWN, places, recorded)

    if choices.tokens is None:
        yield
        return
    choosers = indexers(model)
    with _watched(
        model,
        lambda name, tokens: _Watch(
            lambda slot, start, places: known(name, slot, start, places), tokens
        ),
    ):
        yield


class _Watch(TorchFunctionMode):
    """Hands the places that `topk`, `max` and `masked_fill` pick to `decide`, which may put others
    in their stead.

    Args:
        decide: (number of the choice in this call, first token, [tokens, picks] places) -> other
            places, or None.
        hidden: what the router was called with: [..., tokens, H].
    """

    def __init__(
        self,
        decide: Callable[[int, int, Tensor], Tensor | None],
        hidden: Tensor,
    ) -> None:
        super().__init__()
        self.decide = decide
        self.slot = 0
        self.tokens = hidden.numel() // hidden.shape[-1]
        self.start = start_of_chunk()

    def __enter__(self) -> _Watch:
        self.outer = getattr(_state, "innermost", None)
        _state.innermost = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _state.innermost = self.outer
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _state.innermost is not self:  # a router inside a block: the choice is the router's
            return func(*args, **kwargs)
        if func in _MASKED_FILL:
            scores, mask, value = args
            decided = self._decided(mask.long())
            return func(scores, mask if decided is None else decided.bool(), value)
        result = func(*args, **kwargs)
        if func not in _TOPK and not (func in _MAX and isinstance(result, tuple)):
            return result
        scores = args[0] if args else kwargs["input"]
        places: Tensor = result[1]
        decided = self._decided(places)
        if decided is None:
            return result
        dim = _dim(func, args, kwargs)
        reduced = places.dim() < scores.dim()  # max without keepdim
        values = scores.gather(dim, decided.unsqueeze(dim) if reduced else decided)
        return type(result)((values.squeeze(dim) if reduced else values, decided))

    def _decided(self, places: Tensor) -> Tensor | None:
        decided = self.decide(self.slot, self.start, places.reshape(self.tokens, -1))
        self.slot += 1
        return None if decided is None else decided.reshape(places.shape)


def _dim(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Along which dimension `topk(input, k, dim=-1)` or `max(input, dim)` picks."""
    if "dim" in kwargs:
        return int(kwargs["dim"])
    place = 2 if func in _TOPK else 1
    return int(args[place]) if len(args) > place else -1


@contextlib.contextmanager
def _watched(model: nn.Module, watch: Callable[[str, Tensor], _Watch]) -> Iterator[None]:
    """Inside the block each router's forward runs inside a watch of its own, on whatever thread it
    is called.
    """
    restore: list[Callable[[], None]] = []
    try:
        for name, module in indexers(model).items():
            restore.append(_wrap_indexer(name, module, watch))
        found = routers(model)
        for name, module in found.items():
            restore.append(_wrap(name, module, watch))
            experts = dict(module.named_children()).get("experts")
            if experts is not None and not any(m in found.values() for m in experts.modules()):
                restore.append(_wrap_experts(experts))
        yield
    finally:
        for undo in restore:
            undo()


def _wrap_experts(module: nn.Module) -> Callable[[], None]:
    """The experts of a block run outside of the block's watch."""

    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outer, _state.innermost = getattr(_state, "innermost", None), None
            try:
                return own(*args, **kwargs)
            finally:
                _state.innermost = outer

        return forward

    return _replace_forward(module, change)


def _wrap(
    name: str, module: nn.Module, watch: Callable[[str, Tensor], _Watch]
) -> Callable[[], None]:
    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            training, module.training = module.training, False  # no noise
            try:
                with watch(name, hidden):
                    return own(*args, **kwargs)
            finally:
                module.training = training

        return forward

    return _replace_forward(module, change)


def _wrap_indexer(
    name: str, module: nn.Module, watch: Callable[[str, Tensor], _Watch]
) -> Callable[[], None]:
    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            # [1, T, K], or [1, heads, T, K] of blocks
            picks: Tensor = own(*args, **kwargs)
            rows = picks[0] if picks.dim() == 3 else picks[0].transpose(0, 1)
            decided = watch(name, hidden).decide(0, start_of_chunk(), rows.flatten(1))
            if decided is None:
                return picks
            decided = decided.reshape(rows.shape).to(picks.dtype)
            return decided[None] if picks.dim() == 3 else decided.transpose(0, 1)[None]

        return forward

    return _replace_forward(module, change)


def _replace_forward(
    module: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """The module's forward becomes `change(forward)`. Returns what undoes it."""
    holder: Any = module
    # What stands in place of a module's forward to run it in chunks keeps the module's own as
    # `forward`: the watch goes inside.
    while hasattr(holder.__dict__.get("forward"), "forward"):
        holder = holder.__dict__["forward"]
    own = holder.forward
    replaced = "forward" in holder.__dict__
    holder.forward = change(own)

    def undo() -> None:
        if replaced:
            holder.forward = own
        else:
            del holder.__dict__["forward"]

    return undo


def _plain(name: str) -> str:
    """Without what wrappers put between a module and its parent."""
    return (
        name.replace("module.", "", 1)
        if name.startswith("module.")
        else name.replace(".base_layer", "")
    )
