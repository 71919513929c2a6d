"""The usual way to run a ring over packed documents, for comparison: every document is cut into 2n
chunks of its own.

Each rank holds chunks r and 2n - 1 - r of every document (padded to a multiple of 2n) and calls a
kernel for several documents at each step, as ring-flash-attn's zigzag varlen and Transformer Engine
do. Messages, merge and kernels are the engine's own, so that only the partition differs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longfactory.sp.backends import fa4
from longfactory.sp.backends import math as plain
from longfactory.sp.merge import merge_
from longfactory.sp.schedules.ring import Exchange, _pack, _unpack
from longfactory.sp.tiles import Tile

aten = torch.ops.aten


class PerDocumentZigzag:
    """`lengths`: tokens of each document of the whole row. Every document gets its share of
    padding: see `local_length`.
    """

    def __init__(
        self, lengths: list[int], group: dist.ProcessGroup, kernel: str, device: torch.device
    ) -> None:
        self.group, self.kernel, self.device = group, kernel, device
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.padded = [-(-x // (2 * self.n)) * 2 * self.n for x in lengths]
        edges = [0]
        for x in self.padded:
            edges.append(edges[-1] + x // self.n)
        self.local_length = edges[-1]
        self.cu, self.cu_half = (
            torch.tensor([e // d for e in edges], dtype=torch.int32, device=device) for d in (1, 2)
        )
        self.longest = max(self.padded) // self.n
        pairs = list(itertools.pairwise(edges))
        self.front = torch.cat([torch.arange(a, (a + b) // 2) for a, b in pairs]).to(device)
        self.back = torch.cat([torch.arange((a + b) // 2, b) for a, b in pairs]).to(device)

    def positions(self) -> Tensor:
        """Rows of the padded row that this rank holds."""
        rows, start = [], 0
        for x in self.padded:
            chunk = x // (2 * self.n)
            for c in (self.rank, 2 * self.n - 1 - self.rank):
                rows.append(torch.arange(start + c * chunk, start + (c + 1) * chunk))
            start += x
        return torch.cat(rows)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Differentiable."""
        return _Attention.apply(q, k, v, self)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        flat, own = _pack(k, v), (k, v)
        out = lse = None
        for step in range(self.n):
            moving = (
                Exchange(flat, self.rank + 1, self.rank - 1, self.group)
                if step + 1 < self.n
                else None
            )
            if step == 0:
                first, lse = self._forward(q, k, v, "whole", "whole", True, scale)
                out = first.to(torch.float32 if q.dtype != torch.float64 else torch.float64)
            elif step <= self.rank:
                merge_(
                    out,
                    lse,
                    *self._forward(q, k[self.front], v[self.front], "whole", "half", False, scale),
                )
            else:
                block, block_lse = self._forward(q[self.back], k, v, "half", "whole", False, scale)
                rows, rows_lse = out[self.back], lse[:, self.back].contiguous()
                merge_(rows, rows_lse, block, block_lse)
                out[self.back], lse[:, self.back] = rows, rows_lse
            if moving is not None:
                flat = moving.wait()
                k, v = _unpack(flat, *own)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        flat, own, carried = _pack(k, v), (k, v), None
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        for step in range(self.n):
            moving = (
                Exchange(flat, self.rank + 1, self.rank - 1, self.group)
                if step + 1 < self.n
                else None
            )
            dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in own)
            if step == 0:
                grads = self._backward(dout, q, k, v, out, lse, "whole", "whole", True, scale)
                dq += grads[0]
                dk += grads[1]
                dv += grads[2]
            elif step <= self.rank:
                grads = self._backward(
                    dout, q, k[self.front], v[self.front], out, lse, "whole", "half", False, scale
                )
                dq += grads[0]
                dk[self.front] = grads[1].to(wide)
                dv[self.front] = grads[2].to(wide)
            else:
                b = self.back
                grads = self._backward(
                    dout[b], q[b], k, v, out[b], lse[:, b], "half", "whole", False, scale
                )
                dq.index_add_(0, b, grads[0].to(wide))
                dk += grads[1]
                dv += grads[2]
            grad = _pack(dk, dv)
            if carried is not None:
                grad += carried.wait()
            carried = Exchange(grad, self.rank + 1, self.rank - 1, self.group)
            if moving is not None:
                flat = moving.wait()
                k, v = _unpack(flat, *own)
        dk, dv = _unpack(carried.wait(), *own)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)

    def _lengths(self, which: str) -> tuple[Tensor, int]:
        return (self.cu, self.longest) if which == "whole" else (self.cu_half, self.longest // 2)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_rows: str, k_rows: str, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        (cu_q, max_q), (cu_k, max_k) = self._lengths(q_rows), self._lengths(k_rows)
        if self.kernel.startswith("flash"):
            out, lse, *_ = aten._flash_attention_forward(
                q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
            )
            return out, lse
        if self.kernel == "fa4":
            lengths = {
                "cu_seqlens_q": cu_q,
                "cu_seqlens_k": cu_k,
                "max_seqlen_q": max_q,
                "max_seqlen_k": max_k,
            }
            return fa4._interface()._flash_attn_fwd(
                q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **lengths
            )[:2]
        parts = [
            plain.forward(q[a:b], k[c:d], v[c:d], t, scale, None)
            for a, b, c, d, t in _documents(cu_q, cu_k, causal)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_rows: str,
        k_rows: str,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        (cu_q, max_q), (cu_k, max_k) = self._lengths(q_rows), self._lengths(k_rows)
        lse = lse.contiguous()
        if self.kernel.startswith("flash"):
            rng = torch.empty(2, dtype=torch.uint64, device=q.device)
            unused = torch.empty((), dtype=torch.uint64, device=q.device)
            settings = (cu_q, cu_k, max_q, max_k, 0.0, causal, rng, unused)
            return aten._flash_attention_backward(dout, q, k, v, out, lse, *settings, scale=scale)
        if self.kernel == "fa4":
            lengths = {
                "cu_seqlens_q": cu_q,
                "cu_seqlens_k": cu_k,
                "max_seqlen_q": max_q,
                "max_seqlen_k": max_k,
            }
            return fa4._interface()._flash_attn_bwd(
                q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, **lengths
            )[:3]
        parts = [
            plain.backward(dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b], t, scale, None)
            for a, b, c, d, t in _documents(cu_q, cu_k, causal)
        ]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: PerDocumentZigzag) -> Tensor:
        out, lse = ring.forward(q, k, v, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return (*ctx.ring.backward(dout, q, k, v, out, lse, q.shape[-1] ** -0.5), None)


def _documents(cu_q: Tensor, cu_k: Tensor, causal: bool) -> list[tuple[int, int, int, int, Tile]]:
    out = []
    q, k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(q) - 1):
        rows, cols = slice(0, q[i + 1] - q[i]), slice(0, k[i + 1] - k[i])
        if rows.stop and cols.stop:
            out.append(
                (q[i], q[i + 1], k[i], k[i + 1], Tile(rows, cols, "causal" if causal else "full"))
            )
    return out


def attention_pairs(lengths: list[int]) -> int:
    """(query, key) pairs of causal attention inside documents."""
    return sum(math.comb(x + 1, 2) for x in lengths)
