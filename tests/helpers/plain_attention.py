"""The specification: the mask element by element, and softmax attention in float64 with autograd.
Written without the engine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longfactory import sp
from longfactory.sp import Segment


def plain_mask(
    segments: Sequence[Segment], length: int, window: int | None = None, chunk: int | None = None
) -> Tensor:
    """[T, T] bool: does query i see key j?"""
    owner, position, ends = [0] * length, [0] * length, []
    for i, s in enumerate(segments):
        first = ends[s.parent] if s.parent >= 0 else 0
        for t in range(s.start, s.stop):
            owner[t], position[t] = i, first + t - s.start
        ends.append(first + s.stop - s.start)

    def lineage(i: int) -> set[int]:
        return {i} if segments[i].parent < 0 else {i} | lineage(segments[i].parent)

    family = [lineage(i) for i in range(len(segments))]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen = owner[j] in family[owner[i]] and position[j] <= position[i]
            if window is not None:
                seen = seen and position[i] - position[j] < window
            if chunk is not None:
                seen = seen and position[i] // chunk == position[j] // chunk
            mask[i, j] = seen or (owner[i] == owner[j] and segments[owner[i]].block)
    return mask


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    s = s.masked_fill(~mask.to(s.device), -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.view(-1, 1, 1).expand(-1, s.shape[1], 1)], -1)
    p = s.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1))


def random_inputs(
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim or dim), (heads, v_dim or dim))
    q, k, v, dout = (
        torch.randn(length, *s, generator=g, dtype=torch.float64).to(dtype) for s in shapes
    )
    return q, k, v, dout


def context(
    mode: str,
    ulysses: int | None = None,
    backend: str = "auto",
    heads: int | None = None,
    kv: int | None = None,
) -> Any:
    """A context of all processes. With NCCL one a process and setting: its groups stay when a
    function of a rank ends.
    """
    return (_kept if dist.get_backend() == "nccl" else _created)(mode, ulysses, backend, heads, kv)


def _created(
    mode: str, ulysses: int | None, backend: str, heads: int | None, kv: int | None
) -> Any:
    return sp.SequenceParallel.create(
        dist.get_world_size(),
        mode=mode,
        ulysses_degree=ulysses,
        backend=backend,
        heads=heads,
        kv_heads=kv,
    )


_kept = functools.cache(_created)
