"""What a tile needs of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Request(NamedTuple):
    """A kind of tile: what a backend accepts or refuses."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    kind: str
    window: bool
    softcap: bool
    aligned: bool
    """Both sides are multiples of 128 rows, so that shapes are few."""
    deterministic: bool = False
    """The backward pass adds in the same order every time (torch.use_deterministic_algorithms)."""
    large: bool = False
    """2^31 elements or more: kernels with 32-bit offsets stop there."""
    group: int = 2
    """Query heads for each key head. Some kernels are compiled for it."""
