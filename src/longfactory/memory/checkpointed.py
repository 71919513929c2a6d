"""Any Hugging Face decoder layer, recomputed in backward without running its attention kernel a
second time.

`CheckpointedLayer` takes the place of a layer's `forward` on the instance. So it runs inside
`layer.__call__`: the hooks of FSDP2 and ZeRO gather the layer's parameters around it, in whatever
version of transformers, and it may be installed before or after they wrap the model. It is torch's
checkpointing, with three things added: the layer's one stored tensor, its input, goes where
`Activations` sends it; what attention returned is recorded in the first pass and replayed in the
recompute; and a segment's inner layers store nothing at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.offload import Activations, LayerInput, Pair
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, StepMoments, Technique, Work
from longfactory.memory.temporaries import beyond_stored_bytes, stored_expert_bytes
from longfactory.sp import keep


class CheckpointedLayer:
    """Takes the place of `layer.forward`.

    Args:
        layer: the decoder layer. Its own checkpointing flag is turned off: it would checkpoint a
            second time.
        index: its place among the model's layers.
    """

    def __init__(self, layer: nn.Module, index: int, store: Activations) -> None:
        self.forward = layer.forward
        self.layer = layer
        self.index = index
        self.store = store
        self.random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.modules())
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        store = self.store
        if store.record is not None:  # a segment is being run forward again
            with keep(store.record):
                return self.forward(*args, **kwargs)
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        if args:
            x, rest = args[0], args[1:]
        else:
            x, rest = kwargs.pop("hidden_states"), ()
        return self.checkpointed(x, rest, kwargs)

    def checkpointed(self, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(self, x, rest, kwargs)
        with saved_tensors_hooks(call.pack, call.unpack):
            return checkpoint(
                call.run,
                x,
                use_reentrant=False,
                preserve_rng_state=self.random,
                context_fn=call.contexts,
            )


class _Forgets(list[Pair]):
    """Takes pairs and has none."""

    def append(self, pair: Pair) -> None:
        pass


class _Call:
    """One call of a layer: what its forward gives to its backward."""

    def __init__(
        self, owner: CheckpointedLayer, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.owner, self.rest, self.kwargs = owner, rest, kwargs
        self.pairs: list[Pair] = []
        self.handle: LayerInput | None = None
        self.about = (x.data_ptr(), x.shape)

    def run(self, x: Tensor) -> Any:
        return self.owner.forward(x, *self.rest, **self.kwargs)

    def again(self, x: Tensor) -> Tensor:
        """For segments: through `layer.__call__`, so that hooks gather the parameters. Recording is
        on (see `Activations.recording`).
        """
        y = self.owner.layer(x, *self.rest, **self.kwargs)
        return y[0] if isinstance(y, tuple) else y

    # What checkpointing stores: the layer's input, once.

    def pack(self, t: Tensor) -> Any:
        if (t.data_ptr(), t.shape) != self.about or self.handle is not None:
            return t
        self.handle = self.owner.store.layer_input(self.owner.index, t.detach(), self.again)
        return self.handle

    def unpack(self, held: Any) -> Tensor:
        return held.input() if isinstance(held, LayerInput) else held

    # Around the two passes.

    def contexts(
        self,
    ) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return self.first_pass(), self.recompute()

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        owner, handle = self.owner, self.handle
        if handle is not None and not handle.last_in_segment:
            # Backward replays what the segment's forward will record, so both passes must save the
            # same tensors: attention that exchanges heads saves others where it is recorded. What
            # is recorded here is nothing.
            with keep(_Forgets()):
                yield
            return
        if handle is None or not owner.store.saves_attention(owner.index):
            yield
            return
        with keep(self.pairs):
            yield
        handle.set_attention(owner.store.save_attention(owner.index, self.pairs))
        self.pairs = []

    @contextlib.contextmanager
    def recompute(self) -> Iterator[None]:
        store = self.owner.store
        pairs = self.handle.attention() if self.handle is not None else None
        if not store.settings.late_prefetch:
            store.prefetch()
        # An empty list would record what the recompute computes.
        with keep(pairs) if pairs else contextlib.nullcontext():
            yield
        if store.settings.late_prefetch:
            store.prefetch()


# ---- what the planner needs to know --------------------------------------------------------------


def _checkpoint_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[str]:
    # Beside gathered weights of four bits a run that was planned so ran out of memory
    # (7b-qlora-32k on two GPUs, benchmarks/results/plan_accuracy.md).
    gathered = job.shape.quantized and job.sharded
    return ("none", "full") if mode == "auto" and not gathered else ("full",)


CAST = "copies of weights in half precision"  # item of the budget


def _checkpoint_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """Without it: what autograd stores of every layer, and the gradients within one. Autocast's
    copies of weights live as long as the forward pass, or as what autograd stores; those of routed
    experts as long as their layer's pass.
    """
    cast = job.cast_bytes
    if settings.checkpoint == "full":
        layer = job.shape.width * job.shape.layer_parameters if cast else 0.0
        if job.shape.routed_parameters:
            cast = min(cast, job.held_cast_bytes + layer)
        return Bytes(gpu={CAST: StepMoments(cast, layer, layer)} if cast else {})
    stored = job.local * sum(
        count * stored_of_a_token(job, kind) for kind, count in job.shape.layers_of_kinds
    )
    within = job.local * max(beyond_stored_bytes(job, kind) for kind in job.shape.kinds)
    items = {"activations": StepMoments(stored, stored + within, within)}
    if cast:
        items[CAST] = StepMoments(cast, cast, 0.0)
    return Bytes(gpu=items)


def stored_of_a_token(job: TrainingJob, kind: LayerKind) -> float:
    """Bytes that autograd stores of one token in one of transformers' layers: what the backward of
    its norms (in fp32, but for models with recurrent layers), linear maps, attention, activation
    and experts reads.
    """
    shape, hidden, width = job.shape, kind.hidden, job.shape.width
    if shape.adapters:  # frozen norms store their input; each adapted map the input of its adapter
        norms, maps = 4.0 * kind.norms, 5.0 * width
        around_heads = 4.0
    elif job.wide_hidden and width == 2:  # what a linear map is given is cast for it
        norms, maps = 8.0 * kind.norms, 5.0 * width
        around_heads = 6.0
    else:
        norms, maps = (6.0 + width) * kind.norms, 0.0
        around_heads = 4.0 + width
    if any(k.recurrent_flop for k in shape.kinds):  # norms in one kernel store their input alone
        norms, around_heads = norms / 2, around_heads / 2
    stored = (norms + maps) * hidden
    stored += width * (kind.queries + kind.keys_values + kind.outputs) + 4.0 * kind.heads
    if shape.adapters:
        stored += width * kind.outputs
    if kind.head_norms:
        stored += around_heads * (kind.queries + kind.kv_heads * kind.head_dim)
    stored += 4.0 * width * kind.dense_width + kind.recurrent_bytes
    if kind.chooses(job.tokens):
        stored += 4.0 * kind.chosen
    if kind.experts:
        # and its place in the order, twice
        stored += stored_expert_bytes(job, kind) + 20.0 * kind.used + 4.0 * kind.experts
    return stored + job.router_bytes(kind)


def _checkpoint_work(job: TrainingJob, settings: MemorySettings) -> Work:
    """A forward pass more; the hand-written layer computes two of a dense MLP's three products,
    where no norm follows.
    """
    if settings.checkpoint == "none":
        return Work()
    two = all(job.written(k) and not (k.experts or k.norms_after) for k in job.shape.kinds)
    return Work(
        again_projections=1.0,
        again_mlp=2 / 3 if two else 1.0,
        again_attention=1.0,
    )


def _checkpoint_words(settings: MemorySettings) -> str | None:
    return "every activation stored" if settings.checkpoint == "none" else None


def _checkpoint_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    stored = settings.checkpoint == "none"
    return (2, "disable_gradient_checkpointing: false") if stored else None


CHECKPOINTING = Technique(
    "checkpoint",
    _checkpoint_values,
    0,
    bytes=_checkpoint_bytes,
    work=_checkpoint_work,
    words=_checkpoint_words,
    advice=_checkpoint_advice,
)


def _saved_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[float]:
    shares = (1.0, 0.75, 0.5, 0.25, 0.0)
    return shares[:-1] if settings.offload == "inputs+attention" else shares


def _saved_fixed(arguments: Any) -> dict[str, Any]:
    share = arguments.keep_attention
    return {} if share == "auto" else {"keep_attention": float(share)}


def _saved_work(job: TrainingJob, settings: MemorySettings) -> Work:
    """Of a segment only the last layer's output is saved in the first pass."""
    return Work(again_attention=-settings.keep_attention / settings.segment_layers)


def _saved_words(settings: MemorySettings) -> str | None:
    if settings.checkpoint == "none":
        return None
    if settings.keep_attention == 0:
        return "attention recomputed"
    return f"attention outputs saved in {settings.keep_attention:.0%} of layers"


def _saved_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    return (7, "keep_attention: 0") if settings.keep_attention > 0 else None


# Its bytes are those of what is stored for backward: `offload.stored_bytes`.
SAVED_ATTENTION = Technique(
    "keep_attention",
    _saved_values,
    8,
    _saved_fixed,
    work=_saved_work,
    words=_saved_words,
    advice=_saved_advice,
)
