"""A tile of several documents as one call for each, for kernels that know no documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..tiles import Tile


def forward(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] by a backend's `forward`."""
    parts = [
        kernel(q[rows], k[rows], v[rows], document, scale, softcap)
        for rows, document in _documents(tile)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def backward(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by a backend's `backward`."""
    parts = []
    for rows, document in _documents(tile):
        of_queries = (x[rows] for x in (dout, q, k, v, out))
        parts.append(kernel(*of_queries, lse[:, rows], document, scale, softcap))
    dq, dk, dv = (torch.cat(x) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _documents(tile: Tile) -> list[tuple[slice, Tile]]:
    assert tile.cu_seqlens is not None
    found = []
    for a, b in itertools.pairwise(tile.cu_seqlens):
        square = slice(0, b - a)
        window = tile.window if tile.window is not None and tile.window < b - a - 1 else None
        found.append((slice(a, b), Tile(square, square, "causal", window=window)))
    return found
