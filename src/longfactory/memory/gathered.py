"""Weights that FSDP2 has gathered: given up after each layer's forward pass and gathered again for
its backward, or kept until then where they fit.

FSDP2's collectives run beside the layers, but take processors and memory from them, and each weight
that was gathered is copied once more on the stream that computes.
"""

from __future__ import annotations

import collections
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from longfactory.memory import uncopied
from longfactory.memory.optimizer import SplitAdamW
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, StepMoments, Technique
from longfactory.sp.text_model import decoder_layers


def begin(model: nn.Module, settings: MemorySettings, optimizer: SplitAdamW | None = None) -> None:
    """Before the first step of a model that is sharded.

    Args:
        optimizer: of it, if it is of split masters.
    """
    if isinstance(model, FSDPModule):
        uncopied.begin()
    leave_embedding_sharded(model)
    keep_weights(model, settings.keep_weights)
    if isinstance(model, FSDPModule) and optimizer is not None and optimizer.placement == "gpu":
        BesideUpdate(model, optimizer)


def keep_weights(model: nn.Module, keep: bool) -> None:
    """Whether the decoder layers of a sharded model keep their gathered weights from forward until
    their backward. Models that FSDP2 does not shard are left alone.

    Of layers that keep them, each begins to gather the next one's before it computes, and the
    embedding the first one's. Attention's kernels occupy every processor until they end: a gather
    that is begun later comes beside the products of the MLP instead. Large weights are gathered
    where they are used, except those of the first layer, whose gather runs beside the optimizer's
    update and so cannot wait for it.
    """
    layers = [layer for layer in decoder_layers(model)[1] if isinstance(layer, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(not keep, recurse=False)
    inner = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    before = [inner] if isinstance(inner, FSDPModule) else []
    for unit, following in itertools.pairwise([*before, *layers]):
        unit.set_modules_to_forward_prefetch([following] if keep else [])
        uncopied.gather(following, uncopied=keep and unit in layers)


def leave_embedding_sharded(model: nn.Module) -> None:
    """An embedding's gradient needs no weight: FSDP2 does not gather one for backward that is a
    unit of its own (one that is tied to the output layer is gathered with that).
    """
    inner: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    plain = isinstance(inner, nn.Embedding) and not list(inner.children())
    if plain and isinstance(inner, FSDPModule):
        inner.set_unshard_in_backward(False)


class BesideUpdate:
    """What a forward pass gathers first, the embedding and the first decoder layer, is updated
    first, and its gathers run beside the update of the rest; they would have nothing beside them in
    the forward pass.

    FSDP2 takes an event of the optimizer that its gathers wait for (`set_post_optim_event`): here
    that of the first part. All other units wait for the whole update before their forward pass. One
    that is gathered earlier, in the first layer's, comes after FSDP2 has waited for the copy of the
    embedding, which follows the update; where there was none, the first layer waits itself.

    Args:
        model: sharded, with its parameters not gathered.
        optimizer: of it; updates on the GPU.
    """

    def __init__(self, model: nn.Module, optimizer: SplitAdamW) -> None:
        self.model = weakref.ref(model)  # whose hooks hold this
        self.updated: torch.Event | None = None
        self.begun = False  # the embedding was gathered after the last update
        unit_of = _units(model)
        owned: dict[int, list[nn.Parameter]] = collections.defaultdict(list)
        for module, unit in unit_of.items():
            owned[unit] += module.parameters(recurse=False)
        root = unit_of[model]
        first = _first_gathered(model, unit_of)
        if not first or (owned[root] and root not in first):
            return
        for module, unit in unit_of.items():
            if not isinstance(module, FSDPModule):
                continue
            if unit == first[0]:
                module.register_forward_pre_hook(self._begin, prepend=True)
            elif unit == first[-1]:
                module.register_forward_pre_hook(self._wait_unless_begun, prepend=True)
            elif unit != root:
                module.register_forward_pre_hook(self._wait, prepend=True)
        optimizer.update_first(
            [p for unit in first for p in owned[unit]], self._first_part, self._whole
        )

    def _first_part(self) -> None:
        model: Any = self.model()
        event = torch.Event()
        event.record()
        if model is not None:
            model.set_post_optim_event(event)

    def _whole(self) -> None:
        self.begun = False
        self.updated = torch.Event()
        self.updated.record()

    # before FSDP2's own hooks, which gather

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.begun = True

    def _wait_unless_begun(self, module: nn.Module, args: Any) -> None:
        if not self.begun:
            self._wait(module, args)

    def _wait(self, module: nn.Module, args: Any) -> None:
        if self.updated is not None:
            streams = _state(module)._comm_ctx
            streams.all_gather_copy_in_stream.wait_event(self.updated)
            streams.all_gather_stream.wait_event(self.updated)
            self.updated = None


def _state(module: nn.Module) -> Any:
    """FSDP2's, one of all modules that are gathered together."""
    return module._get_fsdp_state()  # type: ignore[operator]


def _units(model: nn.Module) -> dict[nn.Module, int]:
    """Each module -> what its own parameters are gathered with: the `id` of the state of FSDP2."""
    units: dict[nn.Module, int] = {}

    def walk(module: nn.Module, unit: int) -> None:
        units[module] = id(_state(module)) if isinstance(module, FSDPModule) else unit
        for child in module.children():
            walk(child, units[module])

    walk(model, 0)
    return units


def _first_gathered(model: nn.Module, unit_of: dict[nn.Module, int]) -> list[int]:
    """The units of the embedding and of the first decoder layer."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    layers = decoder_layers(model)[1]
    if embedding not in unit_of or not len(layers):
        return []
    return list(dict.fromkeys((unit_of[embedding], unit_of[layers[0]])))


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
