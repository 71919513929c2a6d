"""Chunks by PyTorch: what each needs of its own tokens alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .rule import Rule, normalized, wide

BLOCK = 16
"""Tokens of a chunk's parts, where each key channel has a decay of its own."""


@dataclasses.dataclass
class Within:
    """What the chunks of some heads need of their own tokens alone. N chunks, C tokens of each.

    Attributes:
        qd: [N, h, C, Dk] queries, decayed from the chunk's beginning.
        kd: [N, h, C, Dk] keys, decayed to its end.
        p: [N, h, C, C] scores within the chunk.
        w: [N, h, C, Dk] what a token takes out of the state before the chunk; None without deltas.
        u: [N, h, C, Dv] what it writes, the state before the chunk being zero.
        decay: [N, h, 1 or Dk, 1] of the whole chunk.
    """

    qd: Tensor
    kd: Tensor
    p: Tensor
    w: Tensor | None
    u: Tensor
    decay: Tensor


def within(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rule: Rule) -> Within:
    """Chunks of [N, C, h, ...] -> what they need of their own tokens. Differentiable.

    Args:
        q, k: of the key heads of v's heads, as many or a divisor.
    """
    # [N, C, h, D] -> [N, h, C, D]
    q, k, v, g, beta = (x.transpose(1, 2).to(wide(v)) for x in (q, k, v, g, beta))
    q, k = normalized(q, rule) * rule.scale, normalized(k, rule)
    repeats = v.shape[1] // k.shape[1]
    sums = g.cumsum(2)
    v = v * beta[..., None]
    delta, kk = rule.kind == "delta", None
    if g.dim() == 3:
        # [N, hk, C, C] -> [N, h, C, C]
        products = [x @ k.transpose(-1, -2) for x in ((q, k) if delta else (q,))]
        falls = _falls(sums)
        p, *rest = [x.repeat_interleave(repeats, 1) * falls for x in products]
        kk = rest[0] if delta else None
        sums = sums[..., None]
    else:
        p = decayed_products(q, k, sums)
        if delta:
            kk = decayed_products(k, k, sums)
    q, k = (x.repeat_interleave(repeats, 1) for x in (q, k))
    last = sums[:, :, -1:]
    w, u = None, v
    if kk is not None:
        solved = inverse((kk * beta[..., None]).tril(-1))
        w, u = solved @ (k * sums.exp() * beta[..., None]), solved @ v
    return Within(q * sums.exp(), k * (last - sums).exp(), p, w, u, last.transpose(-1, -2).exp())


def _falls(sums: Tensor) -> Tensor:
    """[..., C] -> [..., C, C]: the decay from token j to token i; 0 where j is later."""
    size = sums.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu(1)
    falls = sums[..., :, None] - sums[..., None, :]
    return falls.masked_fill(later, float("-inf")).exp()


def decayed_products(x: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """[N, h, C, D] each -> [N, h, C, C]: products of x_i and k_j, every channel decayed from j to
    i; 0 where j is later.

    No decay is ever undone, which would overflow: rows are taken in blocks, and what lies between
    an earlier key and a row is split at the beginning of the row's block.
    """
    size, rows = x.shape[2], []
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        own, at = sums[:, :, start:stop], sums[:, :, start : start + 1]
        falls = _falls(own.transpose(-1, -2)).movedim(2, -1)  # [N, h, B, B, D]
        near = (x[:, :, start:stop, None] * k[:, :, None, start:stop] * falls).sum(-1)
        before = k[:, :, :start] * (at - sums[:, :, :start]).exp()
        far = (x[:, :, start:stop] * (own - at).exp()) @ before.transpose(-1, -2)
        rows.append(torch.nn.functional.pad(torch.cat([far, near], -1), (0, size - stop)))
    return torch.cat(rows, 2)


def inverse(lower: Tensor) -> Tensor:
    """The inverse of I + a strictly lower triangular matrix [..., C, C], C a power of two."""
    out: Tensor = _Inverse.apply(lower)
    return out


class _Inverse(torch.autograd.Function):
    """Inverses of the blocks on the diagonal, merged two by two: no powers, which would grow."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        flat = lower.reshape(-1, size, size)
        out = torch.eye(size, dtype=lower.dtype, device=lower.device).repeat(len(flat), 1, 1)
        half = 1
        while half < size:
            done, given = (_diagonal(x, 2 * half) for x in (out, flat))
            first, second = done[..., :half, :half], done[..., half:, half:]
            done[..., half:, :half] = -(second @ given[..., half:, :half] @ first)
            half *= 2
        ctx.save_for_backward(out)
        return out.view(lower.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        transposed = out.transpose(-1, -2)
        return -(transposed @ grad.reshape(out.shape) @ transposed).tril(-1).view(grad.shape)


def _diagonal(x: Tensor, block: int) -> Tensor:
    """[B, C, C] -> a view [B, C / block, block, block] of the blocks on the diagonal."""
    batch, size, _ = x.shape
    blocks = x.view(batch, size // block, block, size // block, block)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
