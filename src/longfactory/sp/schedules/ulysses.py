"""Heads for tokens: an all-to-all gives each rank all the group's rows of a share of the heads.
Jacobs et al., DeepSpeed Ulysses, 2023.

Any number of key heads: each destination gets just the key heads that its query heads use. Query
heads are cut into blocks of gcd(H / n, H / Hk) heads, the largest that never straddle a rank or a
key head; each block travels with one copy of its key head, so the backward pass sums the copies.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from ..collectives import raw_all_to_all
from ..merge import accumulator_dtype


def check(heads: int, kv_heads: int, degree: int) -> None:
    """Refuses heads that `degree` ranks cannot share evenly.

    Raises:
        ValueError: names the largest degree that they can.
    """
    if heads % degree:
        raise ValueError(
            f"{degree} ranks cannot share {heads} query heads evenly. Tell the context the head"
            " count (ctx.set_heads) and leave the degrees out, or use sequence_parallel_mode: usp"
            f" with sequence_parallel_ulysses_degree: {math.gcd(heads, degree)}: a ring takes the"
            " rest."
        )


def copies(heads: int, kv_heads: int, degree: int) -> int:
    """How often each key head travels."""
    group = heads // kv_heads
    return group // math.gcd(heads // degree, group)


def to_heads(x: Tensor, group: dist.ProcessGroup | None, repeat: int = 1) -> Tensor:
    """[m, H, D] of every rank -> [n * m, repeat * H / n, D]: all rows, in rank order, of a share of
    the heads.
    """
    if group is None:
        return x
    n = dist.get_world_size(group)
    if repeat > 1:
        x = x.repeat_interleave(repeat, 1)
    # [m, H, D] -> [n, m, H/n, D]
    parts = raw_all_to_all(x.unflatten(1, (n, -1)).movedim(1, 0), group)
    return parts.flatten(0, 1)


def to_rows(x: Tensor, group: dist.ProcessGroup | None, repeat: int = 1) -> Tensor:
    """The adjoint of `to_heads`: [n * m, repeat * H / n, D] -> [m, H, D], copies of a head
    summed.
    """
    if group is None:
        return x
    n = dist.get_world_size(group)
    if repeat > 1:
        x = x.to(accumulator_dtype(x.dtype))
    # [n * m, h, D] -> [n, m, h, D] -> [m, n * h, D]
    parts = raw_all_to_all(x.unflatten(0, (n, -1)), group).movedim(0, 1).flatten(1, 2).contiguous()
    return parts.unflatten(1, (-1, repeat)).sum(2) if repeat > 1 else parts
