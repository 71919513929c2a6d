"""Short causal convolutions in Triton: each row's taps are read where they lie, so documents and
what comes from other ranks need no copy of the row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fragments import Halo

ROWS = 32
COLUMNS = 128
ACTIVATIONS = frozenset({None, "silu", "swish"})
"""What is applied to the result here; swish is another name of silu."""


@triton.jit
def _tap(x, given, source, rows, zero, column, inside, x_row, given_row):  # type: ignore[no-untyped-def]
    """[R, C] what the rows' taps read: this rank's rows, then given ones, then zeros."""
    here, there = source < rows, (source >= rows) & (source < zero)
    near = tl.load(
        x + source[:, None] * x_row + column[None, :], mask=here[:, None] & inside, other=0.0
    )
    far = tl.load(
        given + (source - rows)[:, None] * given_row + column[None, :],
        mask=there[:, None] & inside,
        other=0.0,
    )
    return near.to(tl.float32) + far.to(tl.float32)


@triton.jit
def _sum_of_taps(  # type: ignore[no-untyped-def]
    x,
    given,
    weight,
    bias,
    taps,
    row,
    column,
    rows,
    zero,
    columns,
    x_row,
    given_row,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """[R, C] the convolution before its activation."""
    inside = (column < columns)[None, :]
    total = tl.zeros([R, C], dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        source = tl.load(taps + row * WIDTH + tap, mask=row < rows, other=0).to(tl.int64)
        factor = tl.load(weight + column * WIDTH + tap, mask=column < columns, other=0.0)
        read = _tap(x, given, source, rows, zero, column, inside, x_row, given_row)
        total += factor.to(tl.float32)[None, :] * read
    if BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    given,
    weight,
    bias,
    taps,
    out,
    rows,
    zero,
    columns,
    x_row,
    given_row,
    out_row,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = (column < columns)[None, :]
    total = _sum_of_taps(
        x, given, weight, bias, taps, row, column, rows, zero, columns, x_row, given_row,
        WIDTH, BIAS, R, C,
    )  # fmt: skip
    if SILU:
        total = total / (1 + tl.exp(-total))
    both = (row < rows)[:, None] & inside
    tl.store(
        out + row[:, None] * out_row + column[None, :], total.to(out.dtype.element_ty), mask=both
    )


@triton.jit
def _slopes(  # type: ignore[no-untyped-def]
    x,
    given,
    weight,
    bias,
    taps,
    grad,
    slope,
    d_weight,
    d_bias,
    rows,
    zero,
    columns,
    x_row,
    given_row,
    grad_row,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients before the activation, and these rows' part of those of the weight and the bias."""
    block = tl.program_id(0).to(tl.int64)
    row = block * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = (column < columns)[None, :]
    both = (row < rows)[:, None] & inside
    given_slope = tl.load(
        grad + row[:, None] * grad_row + column[None, :], mask=both, other=0.0
    ).to(tl.float32)
    if SILU:
        total = _sum_of_taps(
            x, given, weight, bias, taps, row, column, rows, zero, columns, x_row, given_row,
            WIDTH, BIAS, R, C,
        )  # fmt: skip
        share = 1 / (1 + tl.exp(-total))
        given_slope = given_slope * share * (1 + total * (1 - share))
    tl.store(
        slope + row[:, None] * columns + column[None, :],
        given_slope.to(slope.dtype.element_ty),
        mask=both,
    )
    for tap in tl.static_range(WIDTH):
        source = tl.load(taps + row * WIDTH + tap, mask=row < rows, other=0).to(tl.int64)
        read = _tap(x, given, source, rows, zero, column, inside, x_row, given_row)
        tl.store(
            d_weight + (block * columns + column) * WIDTH + tap,
            tl.sum(given_slope * read, 0),
            mask=column < columns,
        )
    if BIAS:
        tl.store(d_bias + block * columns + column, tl.sum(given_slope, 0), mask=column < columns)


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    slope,
    weight,
    stops,
    dx,
    rows,
    columns,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients of the rows, by the rows after them in the same stretch."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = (column < columns)[None, :]
    stop = tl.load(stops + row, mask=row < rows, other=0)
    total = tl.zeros([R, C], dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        reader = row + (WIDTH - 1 - tap)
        factor = tl.load(weight + column * WIDTH + tap, mask=column < columns, other=0.0)
        given = tl.load(
            slope + reader[:, None] * columns + column[None, :],
            mask=(reader < stop)[:, None] & inside,
            other=0.0,
        )
        total += factor.to(tl.float32)[None, :] * given.to(tl.float32)
    tl.store(
        dx + row[:, None] * columns + column[None, :],
        total.to(dx.dtype.element_ty),
        mask=(row < rows)[:, None] & inside,
    )


def convolved(
    x: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, halo: Halo
) -> Tensor:
    """See `convolution.convolution`. Differentiable.

    Args:
        x: [T/n, C].
        given: [S, C] rows given by all ranks.
    """
    out: Tensor = _Convolution.apply(x, given, weight, bias, silu, halo)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        halo: Halo,
    ) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        given, weight = given.contiguous(), weight.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[_grid(x)](
            x, given, weight, weight if bias is None else bias, halo.taps, out,
            len(x), len(x) + len(given), x.shape[1], x.stride(0), given.stride(0), out.stride(0),
            WIDTH=weight.shape[1], BIAS=bias is not None, SILU=silu, R=ROWS, C=COLUMNS,
        )  # fmt: skip
        ctx.save_for_backward(x, given, weight, bias)
        ctx.settings = silu, halo
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, given, weight, bias = ctx.saved_tensors
        silu, halo = ctx.settings
        rows, columns = x.shape
        width = weight.shape[1]
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        grid = _grid(x)
        slope = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = torch.empty(grid[0], columns, width, dtype=torch.float32, device=x.device)
        bias_parts = parts if bias is None else parts.new_empty(grid[0], columns)
        _slopes[grid](
            x, given, weight, weight if bias is None else bias, halo.taps, grad, slope, parts,
            bias_parts, rows, rows + len(given), columns, x.stride(0), given.stride(0),
            grad.stride(0),
            WIDTH=width, BIAS=bias is not None, SILU=silu, R=ROWS, C=COLUMNS,
        )  # fmt: skip
        dx = torch.empty_like(slope)
        _inputs[grid](slope, weight, halo.stops, dx, rows, columns, WIDTH=width, R=ROWS, C=COLUMNS)
        d_given = torch.zeros_like(given)
        if len(halo.readers):
            # Few: rows that are read from before their stretch.
            reads = slope[halo.readers].float() * weight.t().float()[halo.reader_taps]
            own = halo.own
            dx.index_add_(0, halo.read[:own], reads[:own].to(dx.dtype))
            d_given.index_add_(0, halo.read[own:] - rows, reads[own:].to(given.dtype))
        d_weight = parts.sum(0).to(weight.dtype)
        d_bias = None if bias is None else bias_parts.sum(0).to(bias.dtype)
        return dx, d_given, d_weight, d_bias, None, None


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], ROWS), triton.cdiv(x.shape[1], COLUMNS)
