"""What a technique of the memory engine states of itself, beside its code: its key, its bytes and
its seconds. `budget` and `seconds` sum what all of them state, and know none by name.

A field of `MemorySettings` names the object ("chunked.CHUNKS"). docs/adding_a_technique.md shows
how one is added.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob

NONE: Mapping[str, Any] = MappingProxyType({})


class StepMoments(NamedTuple):
    """Bytes at the three moments of a backward pass that can be its peak: the output layer; the
    first layer of backward, when all activations are stored; the last, when all gradients are.
    """

    output_layer: float
    first_layer: float
    last_layer: float


class LayerMoments(NamedTuple):
    """Bytes, for all local tokens, at the three moments of one layer's backward that can be its
    peak: the backward of attention; that of what comes after attention (MLP, projection, norms);
    the forward of a segment's layers.
    """

    attention: float = 0.0
    after_attention: float = 0.0
    segment: float = 0.0


class Bytes(NamedTuple):
    """What a technique adds, by item of the budget: on one GPU, and on the host for one GPU.
    Negative: what it saves."""

    gpu: Mapping[str, StepMoments] = NONE
    host: Mapping[str, float] = NONE
    layer: LayerMoments = LayerMoments()  # to the item "working set of a layer"


class Work(NamedTuple):
    """What a technique adds to the computation of a step. Negative: what it saves.

    Attributes:
        again_projections, again_mlp, again_attention: forward passes of a layer's parts that its
            own backward computes again.
        again_output: the same of the last of the projections, behind attention, beside them.
        again_forward: forward passes of whole layers but for attention, before their backward.
        slower: share of the time of linear layers.
        copied_bytes: to the host in forward, and back in backward, for one GPU.
    """

    again_projections: float = 0.0
    again_output: float = 0.0
    again_mlp: float = 0.0
    again_attention: float = 0.0
    again_forward: float = 0.0
    slower: float = 0.0
    copied_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Technique:
    """One field of `MemorySettings`: what can be set, and what that takes.

    Attributes:
        key: the field.
        values: (job, mode, settings) -> what the search tries, given the fields that it has set
            already (those of lower `depth`); the others have their defaults.
        depth: nesting of the search, outermost first. Of settings equally good, the first is taken.
        fixed: the user's YAML keys (`MemoryArguments`) -> fields of MemorySettings that they fix.
            None, here and below: nothing to state.
        bytes: (job, settings) -> what it adds to the bytes of a step.
        work: (job, settings) -> what it adds to the computation of a step.
        update: (job, settings, seconds of backward) -> seconds of the optimizer beyond backward.
        words: settings -> its part of the plan's line; None for nothing to say.
        advice: (job, settings) -> rank (the strongest has 1) and YAML line that makes room; None
            where it is in use.
        leaner: (job, settings) -> a value that takes less, where the first step came too near to
            the limit. For what can change between steps.
        ordered: each of `values` takes more seconds and no more bytes than the one before it,
            whatever the other fields are, so that the search need not look at all of them.
    """

    key: str
    values: Callable[[TrainingJob, str, MemorySettings], Sequence[Any]]
    depth: int
    fixed: Callable[[Any], dict[str, Any]] | None = None
    bytes: Callable[[TrainingJob, MemorySettings], Bytes] | None = None
    work: Callable[[TrainingJob, MemorySettings], Work] | None = None
    update: Callable[[TrainingJob, MemorySettings, float], float] | None = None
    words: Callable[[MemorySettings], str | None] | None = None
    advice: Callable[[TrainingJob, MemorySettings], tuple[int, str] | None] | None = None
    leaner: Callable[[TrainingJob, MemorySettings], Any] | None = None
    ordered: bool = False


@functools.cache
def techniques() -> tuple[Technique, ...]:
    """The objects that the fields of MemorySettings name, in the order of the fields."""
    names = [field.metadata.get("technique") for field in dataclasses.fields(MemorySettings)]
    found = []
    for name in filter(None, names):
        module, variable = name.split(".")
        found.append(getattr(importlib.import_module(f"longfactory.memory.{module}"), variable))
    return tuple(found)
