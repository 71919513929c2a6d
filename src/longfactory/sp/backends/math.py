"""The mathematics, in float32 (float64 for float64), a block of queries and keys at a time. Any
head dims, any device, soft-cap. Slow.

s = scale * q k^T;  s = softcap * tanh(s / softcap);  p = exp(s - lse);  out = p v dv = p^T dout;
ds = p * (dout v^T - rowsum(dout * out));  ds *= 1 - (s / softcap)^2;  dq = scale * ds k;  dk =
scale * ds^T q

Forward, over the blocks of keys that a block of queries sees: m is the largest score so far, l the
sum of exp(s - m), and the weighted values are scaled by exp(m before - m) where m grows. At the end
out = weighted / l and lse = m + log l. Memory beyond the results does not grow with the length: H *
BLOCK * KEY_BLOCK scores exist at once, two or three times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiles import Tile
from .request import Request

BLOCK = 512
"""Queries at a time."""
KEY_BLOCK = 2048
"""Keys at a time."""


class Block(NamedTuple):
    """`seen` [queries, keys] bool says who sees whom; None where everyone sees all."""

    cols: slice
    seen: Tensor | None


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = k.shape[1]
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for rows, blocks in _blocks(tile, q.device):
        qb = _by_key_head(q[rows], kv_heads, dtype)
        largest = torch.full((*qb.shape[:2], 1), -math.inf, dtype=dtype, device=q.device)
        total = torch.zeros_like(largest)
        weighted = torch.zeros(*qb.shape[:2], v.shape[2], dtype=dtype, device=q.device)
        for cols, seen in blocks:
            s, _ = _scores(qb, k[cols].to(dtype), seen, scale, softcap)
            new = torch.maximum(largest, s.amax(-1, keepdim=True))
            # rows that have seen nothing yet: exp(-inf - shift) is 0, not nan
            shift = new.clamp(min=-1e30)
            p = s.sub_(shift).exp_()
            rescale = torch.exp(largest - shift)
            total = total * rescale + p.sum(-1, keepdim=True)
            weighted.mul_(rescale).baddbmm_(p, v[cols].to(dtype).transpose(0, 1))
            largest = new
        weighted /= total.clamp(min=torch.finfo(dtype).tiny)
        # [Hk, g * rows, D] -> [rows, H, D]
        out[rows] = weighted.view(q.shape[1], -1, v.shape[2]).transpose(0, 1).to(q.dtype)
        lse[:, rows] = (largest + torch.log(total)).view(q.shape[1], -1)
    return out, lse


def backward(
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
    """dq, dk, dv of a tile, from the out and lse of the whole row; see `backends`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # [Hk, keys, D]
    dk = torch.zeros(kv_heads, k.shape[0], k.shape[2], dtype=dtype, device=k.device)
    dv = torch.zeros(kv_heads, v.shape[0], v.shape[2], dtype=dtype, device=v.device)
    for rows, blocks in _blocks(tile, q.device):
        qb, db, ob = (_by_key_head(x[rows], kv_heads, dtype) for x in (q, dout, out))
        shift = lse[:, rows].to(dtype).clamp(min=-1e30).reshape(kv_heads, -1, 1)
        delta = (db * ob).sum(-1, keepdim=True)
        dqb = torch.zeros_like(qb)
        for cols, seen in blocks:
            kb, vb = k[cols].to(dtype), v[cols].to(dtype)
            s, slope = _scores(qb, kb, seen, scale, softcap)
            p = s.sub_(shift).exp_()
            dv[:, cols].baddbmm_(p.transpose(1, 2), db)
            ds = torch.bmm(db, vb.permute(1, 2, 0)).sub_(delta).mul_(p).mul_(scale)
            if slope is not None:
                ds.mul_(slope)
            dqb.baddbmm_(ds, kb.transpose(0, 1))
            dk[:, cols].baddbmm_(ds.transpose(1, 2), qb)
        dq[rows] = dqb.view(q.shape[1], -1, q.shape[2]).transpose(0, 1).to(q.dtype)
    return (
        dq,
        dk.transpose(0, 1).to(k.dtype).contiguous(),
        dv.transpose(0, 1).to(v.dtype).contiguous(),
    )


def _by_key_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[rows, H, D] -> [Hk, g * rows, D]: the query heads that share a key head, one under the
    other.
    """
    return x.to(dtype).transpose(0, 1).reshape(kv_heads, -1, x.shape[2])


def _scores(
    q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[Hk, g * queries, keys] scores, and the soft-cap's derivative. q [Hk, g * queries, D], k
    [keys, Hk, D].
    """
    s = torch.bmm(q, k.permute(1, 2, 0)).mul_(scale)
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = t * softcap, 1 - t * t
    if seen is not None:
        # [Hk, g * queries, keys] -> [Hk * g, queries, keys]
        s.view(-1, *seen.shape).masked_fill_(~seen, -math.inf)
    return s, slope


def _blocks(tile: Tile, device: torch.device) -> Iterator[tuple[slice, list[Block]]]:
    """Blocks of queries, each with the blocks of keys that some of its queries see."""
    offset = tile.q_len - tile.k_len
    for start, stop in itertools.pairwise(tile.cu_seqlens or (0, tile.q_len)):
        for a in range(start, stop, BLOCK):
            b = min(stop, a + BLOCK)
            lo, hi = (start, b) if tile.kind != "full" else (0, tile.k_len)
            if tile.window is not None:
                lo = max(lo, a - tile.window - offset)
            yield (
                slice(a, b),
                [
                    _block(tile, a, b, c, min(hi, c + KEY_BLOCK), device)
                    for c in range(lo, hi, KEY_BLOCK)
                ],
            )


def _block(tile: Tile, a: int, b: int, c: int, d: int, device: torch.device) -> Block:
    """Queries [a, b) against keys [c, d)."""
    reach = None if tile.window is None else tile.window + tile.q_len - tile.k_len
    all_before = tile.kind == "full" or d - 1 <= a
    all_near = reach is None or b - 1 - c <= reach
    if all_before and all_near:
        return Block(slice(c, d), None)
    i = torch.arange(a, b, device=device).unsqueeze(1)
    j = torch.arange(c, d, device=device).unsqueeze(0)
    seen = torch.ones(b - a, d - c, dtype=torch.bool, device=device)
    if not all_before:
        seen &= j <= i
    if reach is not None and not all_near:
        seen &= i - j <= reach
    return Block(slice(c, d), seen)
