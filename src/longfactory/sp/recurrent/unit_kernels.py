"""Vectors over their lengths in Triton (queries and keys of a delta rule), and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count", "HEADS"])
def _unit(  # type: ignore[no-untyped-def]
    x,
    out,
    count,
    scale,
    eps,
    x_row,
    x_head,
    HEADS,
    DK: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
):
    """Vectors over their lengths, times `scale`."""
    i, dk = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BK)
    inside = (i < count)[:, None] & (dk < DK)[None, :]
    place = (i // HEADS)[:, None] * x_row + (i % HEADS)[:, None] * x_head + dk[None, :]
    given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    over = scale * tl.rsqrt(tl.sum(given * given, 1) + eps)
    tl.store(out + i[:, None] * DK + dk[None, :], given * over[:, None], mask=inside)


@triton.jit(do_not_specialize=["count", "HEADS", "SHARE"])
def _unit_gradients(  # type: ignore[no-untyped-def]
    x,
    grad,
    dx,
    count,
    scale,
    eps,
    x_row,
    x_head,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """From gradients of each head of the values to those of what `_unit` read, or, without
    NORMALIZE, of what was only scaled.
    """
    i, dk = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BK)
    inside = (i < count)[:, None] & (dk < DK)[None, :]
    total = tl.zeros([R, BK], dtype=tl.float32)
    for one in range(SHARE):
        place = (i * SHARE + one)[:, None] * DK + dk[None, :]
        total += tl.load(grad + place, mask=inside, other=0.0)
    if NORMALIZE:
        place = (i // HEADS)[:, None] * x_row + (i % HEADS)[:, None] * x_head + dk[None, :]
        given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        over = tl.rsqrt(tl.sum(given * given, 1) + eps)
        along = tl.sum(given * total, 1) * over * over
        total = (total - given * along[:, None]) * over[:, None]
    tl.store(
        dx + i[:, None] * DK + dk[None, :], (total * scale).to(dx.dtype.element_ty), mask=inside
    )


VECTORS = 16
"""Vectors that a program of `_unit` has."""


def scaled(x: Tensor, scale: float, eps: float | None) -> Tensor:
    """[T, hk, Dk] times `scale`, in fp32 and over its length plus `eps`, or as it is for None."""
    if eps is None:
        return x if scale == 1.0 else x.float() * scale
    x = x if x.stride(2) == 1 else x.contiguous()
    rows, heads, dim = x.shape
    out = x.new_empty(x.shape, dtype=torch.float32)
    _unit[(triton.cdiv(rows * heads, VECTORS),)](
        x, out, rows * heads, scale, eps, *x.stride()[:2], heads,
        DK=dim, BK=max(16, triton.next_power_of_2(dim)), R=VECTORS,
    )  # fmt: skip
    return out


def scaled_gradients(x: Tensor, grad: Tensor, scale: float, eps: float | None) -> Tensor:
    """Gradients of x from those of `scaled`, which are of each head of the values.

    Args:
        grad: [T, h, Dk] in fp32.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    rows, heads, dim = x.shape
    dx = x.new_empty(x.shape)
    _unit_gradients[(triton.cdiv(rows * heads, VECTORS),)](
        x, grad, dx, rows * heads, scale, eps or 0.0, *x.stride()[:2], heads,
        grad.shape[1] // heads,
        DK=dim, BK=max(16, triton.next_power_of_2(dim)), R=VECTORS, NORMALIZE=eps is not None,
    )  # fmt: skip
    return dx
