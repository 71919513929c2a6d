"""What a forward pass asked of the engine and what arrived there: filled by the attention and mask
functions, read by the guard.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Asked(NamedTuple):
    """The settings of one attention call."""

    scale: float
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: bool


class Shape(NamedTuple):
    """The tensors of one attention call, but for their number of tokens."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype


@dataclasses.dataclass
class Probe:
    """What was asked of the engine, and what arrived, while it is open."""

    installed: bool = False
    """Whether hand-written layers run as installed. Else they step aside for the Hugging Face
    layer, whose parts can be watched.
    """
    calls: int = 0
    modules: set[int] = dataclasses.field(default_factory=set)
    """Attention modules (their `id`) that called the attention function."""
    heads: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    """(query, key) heads of the calls."""
    windows: set[int] = dataclasses.field(default_factory=set)
    """Sliding windows that reached the attention function."""
    masks: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    """What the model asked of the mask function besides causal: ("window" | "chunk", size)."""
    rows: set[int] = dataclasses.field(default_factory=set)
    """Row lengths that reached rotary embeddings which depend on them."""
    linear: set[int] = dataclasses.field(default_factory=set)
    """Linear-attention modules (their `id`) that were computed over the whole row."""
    layer: int = -1
    """The decoder layer that is running, set by the guard; -1 outside, and in a backward pass."""
    asked: dict[int, set[Asked]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    """Layer -> what its attention modules gave to the attention function."""
    arrived: dict[int, set[Asked]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    """Layer -> what the engine was called with."""
    kernels: set[tuple[Asked, Shape]] = dataclasses.field(default_factory=set)
    """All that the engine was called with."""


_open: Probe | None = None


def current() -> Probe | None:
    """The probe that is open, or None."""
    return _open


def steps_aside() -> bool:
    """Whether a hand-written layer must let the Hugging Face layer run in its place."""
    return _open is not None and not _open.installed


@contextlib.contextmanager
def probe(installed: bool = False) -> Iterator[Probe]:
    """Records what is asked inside the block."""
    global _open
    before, _open = _open, Probe(installed)
    try:
        yield _open
    finally:
        _open = before


_proving = False


def proving() -> bool:
    """Whether the start-up guard runs in this process: on few tokens, with lengths of its own."""
    return _proving


@contextlib.contextmanager
def proof() -> Iterator[None]:
    """The block is the start-up guard's."""
    global _proving
    before, _proving = _proving, True
    try:
        yield
    finally:
        _proving = before


def settings(
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> Asked:
    """The call's settings in one form: 0 is None."""
    return Asked(float(scale), window or None, chunk or None, softcap or None, sinks is not None)
