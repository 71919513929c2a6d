"""The mathematics, in float32 (float64 for float64), a block of queries at a time. Any head dims, any device, soft-cap. Slow.

s = scale * q k^T;  s = softcap * tanh(s / softcap);  p = exp(s - lse);  out = p v
dv = p^T dout;  ds = p * (dout v^T - rowsum(dout * out));  ds *= 1 - (s / softcap)^2;  dq = scale * ds k;  dk = scale * ds^T q
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..tiles import Tile
from .request import Request

BLOCK = 512
"""Queries at a time: H * BLOCK * keys scores exist at once."""


def refuses(request: Request) -> str | None:
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for rows, cols, seen in _blocks(tile, q.device):
        s, _ = _scores(q[rows].to(dtype), k[cols].to(dtype), seen, scale, softcap)
        block = torch.logsumexp(s, -1)
        p = torch.exp(s - block.clamp(min=-1e30).unsqueeze(-1))
        out[rows] = _weighted(p, v[cols].to(dtype)).to(q.dtype)
        lse[:, rows] = block
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    dq = torch.empty_like(q, dtype=dtype)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for rows, cols, seen in _blocks(tile, q.device):
        qb, kb, vb, db, ob = (x.to(dtype) for x in (q[rows], k[cols], v[cols], dout[rows], out[rows]))
        s, slope = _scores(qb, kb, seen, scale, softcap)
        p = torch.exp(s - lse[:, rows].to(dtype).clamp(min=-1e30).unsqueeze(-1))
        # [q, H, D] -> [q, Hk, H/Hk, D]: query heads beside the key head that they share
        split_q, split_d, split_p = (x.unflatten(1 if x is not p else 0, (kv_heads, group)) for x in (qb, db, p))
        dv[cols] += torch.einsum("hgqk,qhgd->khd", split_p, split_d)
        dp = torch.einsum("qhgd,khd->hgqk", split_d, vb)
        delta = (db * ob).sum(-1).t().unflatten(0, (kv_heads, group)).unsqueeze(-1)
        ds = split_p * (dp - delta) * scale
        if slope is not None:
            ds = ds * slope.unflatten(0, (kv_heads, group))
        dq[rows] = torch.einsum("hgqk,khd->qhgd", ds, kb).flatten(1, 2)
        dk[cols] += torch.einsum("hgqk,qhgd->khd", ds, split_q)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """[H, q, k] scores, and the soft-cap's derivative."""
    split = q.unflatten(1, (k.shape[1], -1))
    s = torch.einsum("qhgd,khd->hgqk", split, k).flatten(0, 1) * scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = t * softcap, 1 - t * t
    return (s if seen is None else s.masked_fill(~seen, -math.inf)), slope


def _weighted(p: Tensor, v: Tensor) -> Tensor:
    # [H, q, k] x [k, Hk, D] -> [q, H, D]
    return torch.einsum("hgqk,khd->qhgd", p.unflatten(0, (v.shape[1], -1)), v).flatten(1, 2)


def _blocks(tile: Tile, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys, who sees whom or None for all), with keys that no query of the block sees left out."""
    cuts = tile.cu_seqlens or (0, tile.q_len)
    for start, stop in itertools.pairwise(cuts):
        for a in range(start, stop, BLOCK):
            b = min(stop, a + BLOCK)
            lo, hi = (start, b) if tile.kind != "full" else (0, tile.k_len)
            offset = tile.q_len - tile.k_len
            if tile.window is not None:
                lo = max(lo, a - tile.window - offset)
            i = torch.arange(a, b, device=device).unsqueeze(1)
            j = torch.arange(lo, hi, device=device).unsqueeze(0)
            seen = None
            if tile.kind != "full":
                seen = j <= i
            if tile.window is not None:
                near = i - j <= tile.window + offset
                seen = near if seen is None else seen & near
            yield slice(a, b), slice(lo, hi), seen
