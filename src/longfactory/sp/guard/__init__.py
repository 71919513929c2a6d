"""Before training: the layers as they will be trained, sharded, against transformers' own layers,
on a few tokens.

Three passes of the wrapped model over one row of two documents:

1. Forward without gradients. What the model asks of its attention and of its masks is what arrives
   at the engine, in every layer.
2. Forward and backward in training mode, through what was installed: hand-written layers,
   recomputation, offload, wrappers. Of one decoder layer of each kind the input, the output and
   both gradients are kept. No gradient reaches a parameter: nothing that waits for one runs.
3. Each document alone through the model's own attention: what its layers are called with
   (positions, masks).

Where images pass through the model, `images` compares a row of two images as well.

Then each of those layers is computed again, one at a time: transformers' own code with its own
attention on each document alone, in the run's precision and in a wider one, from the same input and
the same gradient. `compare` says what differs too much.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .. import compare, hf, rope, routers, vision
from ..attention import attention as engine
from ..collectives import all_reduce, gather, shard
from ..compare import Alone, LayerRun, OwnCall
from ..context import SequenceParallel, alignment
from ..layout import Segment
from ..plan import RowPlan
from ..plan import plan as make_plan
from ..probe import Asked, Probe, Shape, probe
from ..recurrent import layers as recurrent
from ..routers import Choices
from . import images

log = logging.getLogger(__name__)

DOCUMENTS = (48, 208)
"""Tokens of the documents that are compared."""
WINDOW = 128
"""Larger windows and chunks are lowered to this for the comparison, so that the longer document
exceeds them.
"""

LARGEST = 1 << 28
"""Numbers in a weight whose gradient is compared. Those of all experts of a large mixture would
need tens of GB in a wider type; what is wrong with their gradients alone is not seen."""


def guard(model: nn.Module, ctx: SequenceParallel) -> None:
    """Proves on a few tokens that the sharded model is the model. Collective: every process of the
    world calls it.

    At size 1 too, where it proves that documents are isolated and that hand-written layers are
    exact. Leaves no trace: gradients, random numbers, the model's mode and settings are as before.
    Call it outside autocast: the model's own wrapper turns it on.

    Raises:
        ValueError: an attention layer was not reached, an argument is lost on the way, or a layer's
            values or gradients differ from those of transformers' layer by more than the precision
            explains. Names the model type, the reason and what to do. Raised on every rank.
        torch.OutOfMemoryError: in the guard; says so.
    """
    inner = hf.unwrap(model)
    config = inner.config.get_text_config()
    device = _device(inner)
    training = {m: m.training for m in model.modules()}
    try:
        with _fixed(model), _no_random_trace(device), _unsaid(ctx):
            reason, seen = _prove(model, inner, ctx, device)
            if vision.has_images(inner) and not _anyone(reason is not None, device):
                model.eval()
                reason = images.differences(model, inner, ctx, device)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"The start-up guard ran out of memory: it trains on a row of {sum(DOCUMENTS)} tokens"
            f" and computes single layers in a wider type, before the first step. {error}"
        ) from error
    # whatever a model does without the mask, the cache or the arguments that it expects
    except Exception as error:
        what = (
            str(error)
            if isinstance(error, ValueError)
            else f"its forward or backward pass fails with {type(error).__name__}: {error}"
        )
        raise ValueError(
            f"Models of type {config.model_type} cannot be trained here: {what}"
        ) from error
    finally:
        for m, mode in training.items():
            m.training = mode
    if _anyone(reason is not None, device):
        raise ValueError(
            f"Models of type {config.model_type} cannot be trained here:"
            f" {reason or 'another rank refused it'}. Choose a model type that docs/models.md marks"
            " exact; if this one is, another attention_backend may compute it (attention_backend:"
            " math)."
        )
    if seen.heads:
        ctx.set_heads(math.gcd(*(h for h, _ in seen.heads)), math.gcd(*(h for _, h in seen.heads)))


def _prove(
    model: nn.Module, inner: PreTrainedModel, ctx: SequenceParallel, device: torch.device
) -> tuple[str | None, Probe]:
    """The reason to refuse the model, or None; and what its first pass asked for."""
    layers = listed_modules(inner)
    documents = [_tokens(n, i, inner, device) for i, n in enumerate(_lengths(inner, _SHORT))]
    model.eval()
    with torch.no_grad(), probe() as seen, _Executed(inner) as executed, _marked(layers, seen):
        _Row(documents, ctx).run(model)
    reason = _not_reached(inner, seen, executed) or _not_arrived(seen, layers)
    if _anyone(reason is not None, device):
        return reason, seen
    documents = [_tokens(n, i, inner, device) for i, n in enumerate(_lengths(inner, DOCUMENTS))]
    layers = _decoder_layers(layers, seen)
    with _lowered_windows(inner):
        runs = [LayerRun(layer, index) for index, layer in _one_of_each_kind(layers, seen)]
        row = _Row(documents, ctx)
        with probe(installed=True) as trained, _marked(layers, trained):
            first = _train(_callee(model), layers, runs, row, trained, device)
        rows = [row]
        if ctx.size > 1:  # the exchange of a row depends on its documents
            rows.append(_Row([torch.cat(documents)], ctx))
        reason = _differently_installed(seen, trained, layers) or _attention_differs(
            trained, rows, device
        )
        # What differs here would hang the ranks that go on.
        if not _anyone(reason is not None, device):
            reason = _differences(model, inner, layers, runs, first, documents, device)
    return reason, seen


# ---- the row


class _Row:
    """Documents one after another, between paddings; this rank's part of it.

    Attributes:
        tensors: `input_ids` and `position_ids`, [T] each.
        lengths: of the documents.
        span: where the documents are in the row.
    """

    def __init__(self, documents: list[Tensor], ctx: SequenceParallel) -> None:
        self.lengths = [len(ids) for ids in documents]
        used = sum(self.lengths)
        padding = -used % alignment(ctx)
        # The row of ranks that take 128 tokens at least is longer than the documents. Where each
        # rank has one stretch of it, so much before them puts them on two ranks; where it has two,
        # on several.
        before = min(padding, (used + padding) // ctx.size // 4) if ctx.size > 1 else 0
        self.span = slice(before, before + used)
        lengths = [n for n in (before, *self.lengths, padding - before) if n]
        ends = list(itertools.accumulate(lengths))
        device, zeros = documents[0].device, documents[0].new_zeros
        self.tensors = {
            "input_ids": torch.cat([zeros(before), *documents, zeros(padding - before)]),
            "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths]),
        }
        segments = [Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        self.plan: RowPlan = make_plan(ends[-1], segments, ctx)

    def run(self, model: nn.Module) -> Any:
        return model(**hf.inputs(self.tensors, self.plan))


_SHORT = (16, 40)


def _lengths(model: PreTrainedModel, wanted: tuple[int, int]) -> tuple[int, int]:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or sum(wanted)
    # of a row's longest document: equal ones have the same frequencies alone
    if rope.depends_on_length(model):
        wanted = (sum(wanted) // 2,) * 2
    return min(wanted[0], limit), min(wanted[1], limit)


def _tokens(n: int, seed: int, model: PreTrainedModel, device: torch.device) -> Tensor:
    """The same on every rank. Away from both ends of the vocabulary, where special tokens are."""
    embedding = model.get_input_embeddings()
    # it may have an adapter
    vocabulary = getattr(embedding, "base_layer", embedding).num_embeddings
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        vocabulary // 8, max(vocabulary // 8 + 2, vocabulary // 2), (n,), generator=generator
    ).to(device)


def _device(model: PreTrainedModel) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "cpu" and dist.is_initialized() and "nccl" in str(dist.get_backend()):
        # parameters that are offloaded to the host
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _callee(model: nn.Module) -> nn.Module:
    """The model inside DDP or a DeepSpeed engine, which prepare a reduction of gradients at each
    call; none come.
    """
    kinds = ("DistributedDataParallel", "DeepSpeedEngine")
    return model.module if any(k.__name__ in kinds for k in type(model).__mro__) else model


# ---- what is the same before and after


@contextlib.contextmanager
def _no_random_trace(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class _Everything(set[str]):
    def __contains__(self, item: object) -> bool:
        return True


@contextlib.contextmanager
def _unsaid(ctx: SequenceParallel) -> Iterator[None]:
    """Inside the block `auto` does not log what it chooses for the guard's rows: the run's first
    row says it of its own.
    """
    said, ctx.said = ctx.said, _Everything()
    try:
        yield
    finally:
        ctx.said = said


@contextlib.contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing in the model is random: no dropout, no jitter of routers."""
    held: list[tuple[dict[str, Any], str, float]] = []
    for module in model.modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in module.__dict__.items():
            if (
                isinstance(value, float)
                and value
                and (name == "p" if dropout else "drop" in name or "jitter" in name)
            ):
                held.append((module.__dict__, name, value))
    try:
        for fields, name, _ in held:
            fields[name] = 0.0
        yield
    finally:
        for fields, name, value in held:
            fields[name] = value


@contextlib.contextmanager
def _lowered_windows(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block no sliding window and no attention chunk is longer than WINDOW, and no
    indexer chooses more keys, wherever it is written: in configurations, in attention modules, in
    hand-written layers."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "window", "index_topk")
    owners: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None), module.__dict__.get("forward")):
            if owner is not None and hasattr(owner, "__dict__"):
                owners[id(owner)] = owner.__dict__
    lowered = [
        (fields, name, WINDOW)
        for fields in owners.values()
        for name in names
        if type(fields.get(name)) is int and fields[name] > WINDOW
    ]
    for fields in owners.values():
        blocks = fields.get("topk_blocks")
        if blocks and blocks * fields["block_size"] > WINDOW:  # an indexer that chooses blocks
            fewer = min(blocks, 8)
            lowered += [(fields, "topk_blocks", fewer), (fields, "block_size", WINDOW // fewer)]
    held = [(fields, name, fields[name]) for fields, name, _ in lowered]
    try:
        for fields, name, value in lowered:
            fields[name] = value
        yield
    finally:
        for fields, name, value in held:
            fields[name] = value


# ---- layers


Layers = dict[int, nn.Module]
"""By their place among all modules that stand in lists."""


def listed_modules(model: nn.Module) -> Layers:
    """The elements of module lists that lie in no other list: decoder layers, and layers of parts
    that do not run.
    """
    found: list[tuple[str, nn.Module]] = []
    outer: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(outer):
            outer = (*outer, f"{name}.")
            found += [(f"{name}.{place}", layer) for place, layer in module.named_children()]
    return dict(enumerate(dict.fromkeys(layer for _, layer in found)))


def _decoder_layers(listed: Layers, seen: Probe) -> Layers:
    """Those that hold attention which ran, and those of the same classes."""
    held = {
        i: m
        for i, m in listed.items()
        if i in seen.asked or any(id(part) in seen.linear for part in m.modules())
    }
    if not held:
        raise ValueError(
            "its attention is not in a list of layers, and the guard cannot compare it layer by"
            " layer"
        )
    return held


def _one_of_each_kind(layers: Layers, seen: Probe) -> list[tuple[int, nn.Module]]:
    """The first layer of each kind: its class and those of its parts, what was installed in it, its
    attention's settings.
    """
    kinds: dict[Any, tuple[int, nn.Module]] = {}
    for index, layer in layers.items():
        parts = tuple(sorted({type(m).__name__ for m in layer.modules()}))
        trained = any(p.requires_grad for p in layer.parameters())
        kind = (
            type(layer),
            type(layer.__dict__.get("forward")),
            parts,
            frozenset(seen.asked.get(index, ())),
            trained,
        )
        kinds.setdefault(kind, (index, layer))
    return list(kinds.values())


@contextlib.contextmanager
def _marked(layers: Layers, seen: Probe) -> Iterator[None]:
    """Tells the probe which layer is running. Hooks on the layer itself do not make a hand-written
    one step aside.
    """

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen.layer = index

        return hook

    def leave(*_: Any) -> None:
        seen.layer = -1

    hooks: list[RemovableHandle] = []
    for index, layer in layers.items():
        hooks += [
            layer.register_forward_pre_hook(enter(index)),
            layer.register_forward_hook(leave, always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Executed:
    """Attention modules, by their class name, that ran inside the block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules: dict[int, tuple[str, nn.Module]] = {}
        self._candidates = [
            (n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Attention")
        ]

    def __enter__(self) -> _Executed:
        self._hooks = [m.register_forward_pre_hook(self._note(n)) for n, m in self._candidates]
        return self

    def _note(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.modules[id(module)] = (name, module)

        return hook

    def __exit__(self, *error: object) -> None:
        for h in self._hooks:
            h.remove()

    def missed(self, reached: set[int]) -> list[str]:
        """Names of those that neither called the attention function nor hold or belong to a module
        that did.
        """
        names = [n for i, (n, _) in self.modules.items() if i in reached]
        return [
            name
            for i, (name, module) in self.modules.items()
            if not any(id(m) in reached for m in module.modules())
            and not any(name.startswith(n + ".") for n in names)
        ]


def _not_reached(model: PreTrainedModel, seen: Probe, executed: _Executed) -> str | None:
    """A layer or a window that did not arrive at the engine."""
    if not seen.linear and recurrent.mixers(model):
        return recurrent.NOT_REACHED
    if not seen.calls and not seen.linear:
        return "none of its layers pass through transformers' attention registry"
    if missed := executed.missed(seen.modules | seen.linear):
        return (
            f"{len(missed)} of its attention layers do not pass through transformers' attention"
            f" registry ({missed[0]})"
        )
    types = hf.layer_types(model.config.get_text_config())
    wanted = sum(t in recurrent.LAYERS for t in types)
    if len(seen.linear) < wanted:
        return (
            f"{len(seen.linear)} of its {wanted} recurrent layers are computed over the whole row"
        )
    asked = {size for kind, size in seen.masks if kind == "window"}
    if wrong := seen.windows - asked:
        return (
            f"its attention names a sliding window of {min(wrong)} tokens that its own mask does"
            " not have"
        )
    if asked - seen.windows and not set(types) <= {"full_attention", *recurrent.LAYERS}:
        return (
            f"its sliding window of {min(asked - seen.windows)} tokens does not reach the attention"
            " function"
        )
    if rope.depends_on_length(model) and not seen.rows:
        return "its rotary frequencies depend on the length of the row, which does not reach them"
    return None


def _not_arrived(seen: Probe, layers: Layers) -> str | None:
    """A setting that a layer gave to the attention function and the engine did not get."""
    for index in seen.asked:
        if different := _settings(seen.asked[index], seen.arrived[index]):
            return (
                f"the attention of {_name(layers, index)} asks for {different[0]} and the engine is"
                f" called with {different[1]}"
            )
    return None


def _differently_installed(seen: Probe, trained: Probe, layers: Layers) -> str | None:
    """A setting that the installed layer gives to the engine, in its forward or in its backward,
    and that the model does not ask for.
    """
    asked = {index: {_lowered(a) for a in seen.asked[index]} for index in seen.asked}
    for index, wanted in asked.items():
        if different := _settings(wanted, trained.arrived[index]):
            what = (
                f"its attention asks for {different[0]} and the engine is called with"
                f" {different[1]}"
            )
            return f"{_name(layers, index)}, as it is trained, is another layer: {what}"
    every = set().union(*asked.values())
    if extra := {a for a in trained.arrived[-1] if _rounded(a) not in {_rounded(e) for e in every}}:
        return f"the backward pass calls the engine with {_text(extra)}, which no layer asks for"
    return None


def _settings(wanted: set[Asked], found: set[Asked]) -> tuple[str, str] | None:
    same = {_rounded(a) for a in wanted} == {_rounded(a) for a in found}
    return None if same else (_text(wanted), _text(found))


def _rounded(a: Asked) -> Asked:
    return a._replace(scale=float(f"{a.scale:.6g}"))


def _lowered(a: Asked) -> Asked:
    return a._replace(
        window=a.window and min(a.window, WINDOW), chunk=a.chunk and min(a.chunk, WINDOW)
    )


def _text(asked: set[Asked]) -> str:
    def one(a: Asked) -> str:
        return ", ".join(
            f"{k} {v:.6g}" if k == "scale" else f"{k} {v}" for k, v in a._asdict().items()
        )

    return " or ".join(one(a) for a in sorted(asked, key=str)) or "nothing"


def _name(layers: Layers, index: int) -> str:
    return (
        f"layer {index} ({type(layers[index]).__name__})"
        if index >= 0
        else "a module outside the layers"
    )


# ---- pass 2


def _train(
    model: nn.Module,
    layers: Layers,
    runs: list[LayerRun],
    row: _Row,
    seen: Probe,
    device: torch.device,
) -> Tensor:
    """Forward and backward through the installed layers. Fills `runs` with the whole row's tensors.

    Returns the first layer's input of the documents' tokens, [D, ...].

    The gradient of the last layer's output is drawn at random, 0 for padding. Gradients are taken,
    not accumulated.
    """
    model.train()
    local = row.plan.local_length
    wanted = {id(run.layer): run for run in runs}
    number: dict[int, int] = {}
    ends: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []
    sharded = {
        id(run.layer): any(hasattr(p, "to_local") for p in run.layer.parameters()) for run in runs
    }
    for run in runs:
        if any(hasattr(p, "ds_id") for p in run.layer.parameters()):
            run.weights = _gathered_by_zero(run.layer)

    def before(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = _hidden(args, kwargs)
        x: Tensor = args[place] if isinstance(place, int) else kwargs[place]
        ends.setdefault("first", x.detach())
        number[id(layer)] = number.get(id(layer), -1) + 1
        # models that run their layers several times train some of the runs
        if not torch.is_grad_enabled():
            return args, kwargs
        # of a frozen embedding it has no gradient, and of a trained one none is asked for
        if "input" not in ends:
            x = ends["input"] = x.detach().requires_grad_()
        x = x.view_as(x)  # used by this layer alone: its gradient is the layer's
        if (run := wanted.get(id(layer))) is not None and run.x is not None:
            run.trained = {}  # weights that are used again: their gradient is not of one call
        elif run is not None:
            run.dim, run.call = _token_dim(x, local), number[id(layer)]
            given = kwargs.get("prev_topk_indices")
            if given is not None and given.shape[-1]:
                run.previous = given[0].detach()
            run.x = x.detach().clone()
            kind = x.device.type
            run.autocast = (
                torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            )
            if not run.weights:
                copy = sharded[id(layer)]
                run.weights = {
                    n: p.detach().clone() if copy else p.detach()
                    for n, p in layer.named_parameters()
                    if _plain_tensor(p)
                }
                run.trained = {
                    n: p
                    for n, p in layer.named_parameters()
                    if p.requires_grad and p.numel() <= LARGEST
                }
            # Copies: the hand-written layers write over the gradients they are given.
            x.register_hook(lambda g: setattr(run, "dx", g.detach().clone()))
        if isinstance(place, int):
            return (*args[:place], x, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: x}

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        y = ends["output"] = compare.first(output)
        if (run := wanted.get(id(layer))) is not None and run.y is None:
            run.y = y.detach().clone()
            y.register_hook(lambda g: setattr(run, "dy", g.detach().clone()))

    for layer in layers.values():
        hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]
    # Recorded to the end of the backward pass: a router that is recomputed must not draw where the
    # recorded one did not.
    with contextlib.ExitStack() as recording:
        choices = [recording.enter_context(routers.record(run.layer)) for run in runs]
        try:
            with torch.enable_grad():
                row.run(model)
        finally:
            for hook in hooks:
                hook.remove()
        seen.layer = -1
        y = ends["output"]
        slope = _slope(row, y, _token_dim(y, local))
        trained = [(run, name, p) for run in runs for name, p in run.trained.items()]
        grads = torch.autograd.grad(
            y, [ends["input"], *(p for _, _, p in trained)], slope, allow_unused=True
        )
    for run, chosen in zip(runs, choices, strict=True):
        run.choices = Choices(
            {n: [_documents(t.to(device), 0, row) for t in picks] for n, picks in chosen.of.items()}
        )
        if run.previous is not None:
            run.previous = _documents(run.previous, 0, row)
    for (run, name, _), g in zip(trained, grads[1:], strict=True):
        if g is not None:
            run.gradients[name] = g.detach()
    for run in runs:
        assert run.x is not None and run.y is not None
        if run.dy is None or run.dx is None:
            raise ValueError(f"no gradient comes back to {_name(layers, run.index)}")
        run.x, run.y, run.dx, run.dy = (
            _documents(t, run.dim, row) for t in (run.x, run.y, run.dx, run.dy)
        )
        for name, p in run.trained.items():
            # In the wide type: every rank's is of its own tokens.
            g = run.gradients.get(name, torch.zeros_like(p))
            run.gradients[name] = g = g.to(compare.reference_dtype(g.dtype)).contiguous()
            if row.plan.ctx.size > 1:
                dist.all_reduce(g, group=row.plan.ctx.group)
    return _documents(ends["first"], _token_dim(ends["first"], local), row)


def _documents(t: Tensor, dim: int, row: _Row) -> Tensor:
    """This rank's tokens in dimension `dim` -> those of the row's documents, [D, ...]."""
    return gather(t.movedim(dim, 0).contiguous(), row.plan)[row.span]


def _zero_padding(t: Tensor, row: _Row) -> None:
    """In place, of [T, ...]."""
    t[: row.span.start] = 0
    t[row.span.stop :] = 0


def _slope(row: _Row, y: Tensor, dim: int) -> Tensor:
    """A random gradient of `y`, of the whole row's tokens the same however it is spread; 0 for
    padding.
    """
    shape = list(y.movedim(dim, 0).shape)
    shape[0] = row.plan.length
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    _zero_padding(slope, row)
    return shard(slope, row.plan).to(y).movedim(0, dim)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where a layer's call has its hidden states."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    raise ValueError("a layer is called without hidden states")


def _token_dim(x: Tensor, tokens: int) -> int:
    """The dimension of the tokens: the last but one, [..., T/n, h]."""
    for dim in (x.dim() - 2, *range(x.dim())):
        if dim >= 0 and x.shape[dim] == tokens:
            return dim
    raise ValueError(
        f"a layer's hidden states {tuple(x.shape)} have no dimension of the row's {tokens} tokens"
    )


def _plain_tensor(p: Tensor) -> bool:
    return type(p) in (Tensor, nn.Parameter)


def _gathered_by_zero(layer: nn.Module) -> dict[str, Tensor]:
    """ZeRO-3 holds a parameter only while it is used. Collective."""
    import deepspeed

    # an attribute, no module of that name
    with deepspeed.zero.GatheredParameters(list(layer.parameters())):
        return {n: p.detach().clone() for n, p in layer.named_parameters()}


# ---- the engine alone


def _attention_differs(seen: Probe, rows: list[_Row], device: torch.device) -> str | None:
    """Every kind of call that the layers make, on random numbers: scores are as large as they must
    be for each setting to matter, which those of a model may not be. Collective over the
    sequence-parallel group."""
    reasons = []
    for (asked, shape), row in itertools.product(sorted(seen.kernels, key=str), rows):
        found = attention_ratios(asked, shape, row, device)
        log.debug("guard: attention of %s, %s: %s", asked, shape, found)
        what, ratio = _worst(found)
        if not ratio <= compare.limit(shape.dtype):
            reasons.append(
                f"the {what} of the engine's attention ({_text({asked})}, {shape.heads} and"
                f" {shape.kv_heads} heads of {shape.dim}) is {_times(ratio, shape.dtype)} as that"
                f" of plain attention in {_short(shape.dtype)}"
            )
    return reasons[0] if reasons else None


def attention_ratios(
    asked: Asked, shape: Shape, row: _Row, device: torch.device
) -> dict[str, float]:
    """Ratios of the engine's output and gradients. Collective over the sequence-parallel group."""
    # Standard deviation of the scores: small, where half precision rounds least, and where a
    # soft-cap bends them.
    spreads = (1.0, asked.softcap / 4) if asked.softcap else (1.0,)
    every = [_attention_ratios(asked, shape, row, device, spread) for spread in spreads]
    return {
        what: _worst({str(i): found[what] for i, found in enumerate(every)})[1] for what in every[0]
    }


def _attention_ratios(
    asked: Asked, shape: Shape, row: _Row, device: torch.device, spread: float
) -> dict[str, float]:
    total, draw = row.plan.length, torch.Generator().manual_seed(2)
    sizes = {
        "q": (shape.heads, shape.dim),
        "k": (shape.kv_heads, shape.dim),
        "v": (shape.kv_heads, shape.value_dim),
    }
    whole = {
        name: torch.randn(total, *size, generator=draw).to(device) for name, size in sizes.items()
    }
    whole["q"] *= spread / (asked.scale * math.sqrt(shape.dim))
    slope = torch.randn(total, shape.heads, shape.value_dim, generator=draw).to(device)
    _zero_padding(slope, row)
    whole = {name: x.to(shape.dtype) for name, x in whole.items()}
    # Sinks that take about half of a token's probability.
    sinks = (
        torch.full((shape.heads,), math.log(32.0) + spread, device=device, dtype=shape.dtype)
        if asked.sinks
        else None
    )

    q, k, v = (shard(x, row.plan).clone().requires_grad_() for x in whole.values())
    settings: dict[str, Any] = {
        "scale": asked.scale,
        "window": asked.window,
        "chunk": asked.chunk,
        "softcap": asked.softcap,
    }
    mine = None if sinks is None else sinks.clone().requires_grad_()
    with torch.enable_grad():
        out = engine(q, k, v, row.plan, **settings, sinks=mine)
    grads = torch.autograd.grad(
        out, [q, k, v, *([] if mine is None else [mine])], shard(slope, row.plan).to(out.dtype)
    )
    run = {
        name: gather(t.detach(), row.plan)[row.span]
        for name, t in zip(("out", "q", "k", "v"), (out, *grads), strict=False)
    }
    if mine is not None:
        run["sinks"] = all_reduce(
            grads[3].to(compare.reference_dtype(shape.dtype)), row.plan.ctx.group
        )
    own = _plain(whole, sinks, slope, asked, row, shape.dtype)
    with _exact_matmul():
        reference = _plain(whole, sinks, slope, asked, row, compare.reference_dtype(shape.dtype))
    unit = compare.rounding(shape.dtype)
    found = {}
    for name in ("out", "q", "k", "v"):
        what = "output" if name == "out" else f"gradient of {name}"
        found[what] = compare.token_ratio(run[name], own[name], reference[name], row.lengths, unit)
    if mine is not None:
        found["gradient of the sinks"] = compare.weight_ratio(
            run["sinks"], own["sinks"], reference["sinks"], unit
        )
    return found


def _plain(
    whole: dict[str, Tensor],
    sinks: Tensor | None,
    slope: Tensor,
    asked: Asked,
    row: _Row,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Plain attention and its gradients, each document alone, in `dtype`."""
    inputs = {name: x[row.span].to(dtype).requires_grad_() for name, x in whole.items()}
    if sinks is not None:
        inputs["sinks"] = sinks.to(dtype).clone().requires_grad_()
    with torch.enable_grad():
        documents = zip(*(inputs[name].split(row.lengths) for name in ("q", "k", "v")), strict=True)
        out = torch.cat(
            [compare.plain_attention(q, k, v, asked, inputs.get("sinks")) for q, k, v in documents]
        )
    grads = torch.autograd.grad(out, list(inputs.values()), slope[row.span].to(dtype))
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}


# ---- pass 3, and the comparison


def _differences(
    model: nn.Module,
    inner: PreTrainedModel,
    layers: Layers,
    runs: list[LayerRun],
    first: Tensor,
    documents: list[Tensor],
    device: torch.device,
) -> str | None:
    calls: dict[int, list[list[OwnCall]]] = {run.index: [] for run in runs}
    model.eval()
    start, reason = 0, None
    with hf.own_attention(inner):
        for number, ids in enumerate(documents):
            inputs = _own_calls(model, layers, runs, calls, ids)
            part = first[start : start + len(ids)]
            start += len(ids)
            reason = reason or _other_input(inputs, part, number, runs)
        lengths = [len(ids) for ids in documents]
        for run in runs:
            found = ratios(
                run, [of_document[run.call] for of_document in calls[run.index]], lengths, device
            )
            log.debug("guard: %s: %s", _name(layers, run.index), found)
            what, ratio = _worst(found)
            if reason is None and not ratio <= compare.limit(run.dtype):
                reason = (
                    f"the {what} of {_name(layers, run.index)}, as it is trained, is"
                    f" {_times(ratio, run.dtype)} as that of transformers' own layer and attention"
                    f" in the run's precision ({_short(run.dtype)})"
                )
    return reason


def _worst(found: dict[str, float]) -> tuple[str, float]:
    return max(found.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def _times(ratio: float, dtype: torch.dtype) -> str:
    wide = _short(compare.reference_dtype(dtype))
    return (
        f"{ratio:.3g} times as far from a computation in {wide} (tolerated:"
        f" {compare.limit(dtype):.3g} times)"
    )


def ratios(
    run: LayerRun, calls: list[OwnCall], lengths: list[int], device: torch.device
) -> dict[str, float]:
    """What `compare.judge` says of one layer. Under `hf.own_attention`."""
    own, reference = _own_and_reference(run, calls, lengths, device)
    if not compare.is_finite(own):
        log.warning(
            "transformers' own %s is not finite in %s on the start-up guard's tokens: what it has"
            " no number for was not compared. Train in bf16, or expect steps without an update.",
            type(run.layer).__name__,
            _short(run.dtype),
        )
    own_errors = compare.own_errors(own, reference, lengths)
    found = compare.judge(run, own_errors, reference, lengths)
    for seed in range(1, compare.SAMPLES):
        if not compare.limit(run.dtype) < _worst(found)[1] < math.inf:
            break
        other = _own_and_reference(compare.perturbed(run, seed), calls, lengths, device)
        own_errors = compare.larger(own_errors, compare.own_errors(*other, lengths))
        found = compare.judge(run, own_errors, reference, lengths)
    return found


def _own_and_reference(
    run: LayerRun, calls: list[OwnCall], lengths: list[int], device: torch.device
) -> tuple[Alone, Alone]:
    """transformers' own layer on each document alone, in the run's precision and in the wider
    one.
    """
    wide = compare.reference_dtype(run.dtype)
    with _eager_experts(run.layer):
        plain = compare.plain_layer(run.layer, run.weights).train()
        own = compare.run_alone(plain, run, calls, lengths, None, device)
        plain = compare.plain_layer(run.layer, run.weights, wide).train()
        recurrent.widen(plain)
        with _exact_matmul():
            reference = compare.run_alone(plain, run, calls, lengths, wide, device)
    return own, reference


@contextlib.contextmanager
def _eager_experts(layer: nn.Module) -> Iterator[None]:
    """Inside the block experts are computed one after another: kernels of grouped products take no
    float64.
    """
    held = {
        id(m.config): m.config
        for m in layer.modules()
        if hasattr(getattr(m, "config", None), "_experts_implementation_internal")
    }
    before = [(config, config._experts_implementation_internal) for config in held.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation


@contextlib.contextmanager
def _exact_matmul() -> Iterator[None]:
    """float32 products of a reference are float32."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _own_calls(
    model: nn.Module,
    layers: Layers,
    runs: list[LayerRun],
    calls: dict[int, list[list[OwnCall]]],
    ids: Tensor,
) -> Tensor:
    """One document through the model's own attention: how its layers are called. Returns the first
    layer's input.
    """
    inputs: list[Tensor] = []
    hooks: list[RemovableHandle] = []

    def note(index: int | None) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = _hidden(args, kwargs)
            if not inputs:
                inputs.append(args[place] if isinstance(place, int) else kwargs[place])
            if index is not None:
                calls[index][-1].append(OwnCall(args, kwargs, place))

        return hook

    chosen = {run.index for run in runs}
    for index in chosen:
        calls[index].append([])
    for index, layer in layers.items():
        hooks.append(
            layer.register_forward_pre_hook(
                note(index if index in chosen else None), with_kwargs=True
            )
        )
    try:
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs[0]


def _other_input(own: Tensor, run: Tensor, number: int, runs: list[LayerRun]) -> str | None:
    """What comes before the layers (embeddings, learned positions) adds little up: both ways give
    the same up to a rounding.
    """
    own = own.movedim(_token_dim(own, len(run)), 0)
    error = (own.double() - run.double()).norm() / own.double().norm().clamp(min=1e-30)
    limit = max(2 * compare.rounding(runs[0].dtype), 1e-3)  # products in float32 may be of TF32
    if not error <= limit:
        return (
            f"the hidden states of document {number + 1} differ by {error:.1e} before the first"
            f" layer, tolerated are {limit:.1e}"
        )
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _anyone(refused: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return refused
    flag = torch.tensor(float(refused), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
