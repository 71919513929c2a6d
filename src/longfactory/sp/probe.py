"""What one forward pass asked of the engine: filled by the attention and mask functions, read by the guard."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch


@dataclasses.dataclass
class Probe:
    calls: int = 0
    modules: set[int] = dataclasses.field(default_factory=set)
    """Attention modules (their `id`) that called the attention function."""
    heads: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    """(query, key) heads of the calls."""
    dtypes: set[torch.dtype] = dataclasses.field(default_factory=set)
    windows: set[int] = dataclasses.field(default_factory=set)
    """Sliding windows that reached the attention function."""
    masks: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    """What the model asked of the mask function besides causal: ("window" | "chunk", size)."""
    rows: set[int] = dataclasses.field(default_factory=set)
    """Row lengths that reached rotary embeddings which depend on them."""
    linear: set[int] = dataclasses.field(default_factory=set)
    """Linear-attention modules (their `id`) that were computed over the whole row."""


_open: Probe | None = None


def current() -> Probe | None:
    return _open


@contextlib.contextmanager
def probe() -> Iterator[Probe]:
    """Records what is asked inside the block."""
    global _open
    before, _open = _open, Probe()
    try:
        yield _open
    finally:
        _open = before
