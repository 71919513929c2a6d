"""Weights that FSDP2 has gathered: given up after each layer's forward pass and gathered again for
its backward, or kept until then where they fit.

FSDP2's collectives run beside the layers, but take processors and memory from them, and each weight
that was gathered is copied once more on the stream that computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, StepMoments, Technique
from longfactory.sp.text_model import decoder_layers


def begin(model: nn.Module, settings: MemorySettings) -> None:
    """Before the first step of a model that is sharded."""
    leave_embedding_sharded(model)
    keep_weights(model, settings.keep_weights)


def keep_weights(model: nn.Module, keep: bool) -> None:
    """Whether the decoder layers of a sharded model keep their gathered weights from forward until
    their backward. Models that FSDP2 does not shard are left alone.
    """
    for layer in decoder_layers(model)[1]:
        if isinstance(layer, FSDPModule):
            layer.set_reshard_after_forward(not keep, recurse=False)


def leave_embedding_sharded(model: nn.Module) -> None:
    """An embedding's gradient needs no weight: FSDP2 does not gather one for backward that is a
    unit of its own (one that is tied to the output layer is gathered with that).
    """
    inner: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    plain = isinstance(inner, nn.Embedding) and not list(inner.children())
    if plain and isinstance(inner, FSDPModule):
        inner.set_unshard_in_backward(False)


def give_up_weights(model: nn.Module) -> None:
    """Gives up what a forward pass without a backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- what the planner needs to know --------------------------------------------------------------

ITEM = "gathered weights of all layers"  # of the budget


def are_gathered(job: TrainingJob) -> bool:
    """Weights are FSDP2's."""
    return job.weight_shards > 1 and not job.zero


def kept_weights(job: TrainingJob, settings: MemorySettings) -> bool:
    """Layers keep what was gathered of their weights."""
    return settings.keep_weights and are_gathered(job)


def _values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[bool]:
    return (True, False) if are_gathered(job) and mode != "long" else (False,)


def _fixed(arguments: Any) -> dict[str, Any]:
    again = arguments.reshard_after_forward
    return {} if again == "auto" else {"keep_weights": not again}


def _bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """Of all layers, from the end of forward on; two of them are counted in a layer's backward
    anyway (`budget.bare_model`).
    """
    if not kept_weights(job, settings):
        return Bytes()
    one, layers = job.shape.layer_bytes, job.shape.layers
    return Bytes(gpu={ITEM: StepMoments(layers * one, max(layers - 2, 0) * one, 0.0)})


def _words(settings: MemorySettings) -> str | None:
    if not settings.keep_weights:
        return None
    return "each layer's weights gathered once per step"


def _advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    return (1, "reshard_after_forward: true") if kept_weights(job, settings) else None


KEPT = Technique(
    "keep_weights",
    _values,
    -1,
    _fixed,
    _bytes,
    words=_words,
    advice=_advice,
    leaner=lambda job, settings: False,
    ordered=True,
)
