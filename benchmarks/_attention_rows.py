"""Rows of documents, and the kernel that does several of them in one call."""

from __future__ import annotations

import itertools
import random

from _attention_setting import Setting, inputs
from longfactory import sp
from longfactory.sp import backends
from longfactory.sp.tiles import Tile


def documents(length: int, median: int, sigma: float, cap: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    out: list[int] = []
    while sum(out) < length:
        out.append(
            min(length - sum(out), int(min(cap, max(16, median * rng.lognormvariate(0, sigma)))))
        )
    return out


MIXES = {"long mix, median 8k": (8192, 1.0, 65536), "chat mix, median 1k": (1024, 1.2, 32768)}


def mixed(setting: Setting, mix: str, length: int) -> list[int]:
    median, sigma, cap = MIXES[mix]
    if setting.smoke:
        median, cap = median // 128, cap // 128
    return documents(length, median, sigma, cap, seed=1)


def segments_of(sizes: list[int]) -> list[sp.Segment]:
    return [sp.Segment(a, b) for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def varlen_kernel(setting: Setting, shape: tuple[int, int]) -> str:
    """Name of the backend that does several documents in one call here."""
    tile = Tile(slice(0, 256), slice(0, 256), "varlen", (0, 100, 256))
    q, _, v, _ = inputs(256, *shape, setting.dim, setting)
    chosen = backends.select("auto", tile, q, v, None)
    return next(name for name, backend in backends.BACKENDS.items() if backend is chosen)
