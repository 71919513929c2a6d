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
SUMMED_ROWS, SUMMED_BLOCKS, SUMMED_WARPS = 16, 16, 8
"""Rows, blocks of rows and warps of a program of `_slopes`, whose sums take registers."""
WIDEST = 4
"""Taps of a convolution that kernels take."""
ACTIVATIONS = frozenset({None, "silu", "swish"})
"""What is applied to the result here; swish is another name of silu."""


@triton.jit
def _tap(  # type: ignore[no-untyped-def]
    x,
    given,
    taps,
    tap: tl.constexpr,
    row,
    column,
    rows,
    zero,
    columns,
    x_row,
    given_row,
    WIDTH: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """[R, C] what a tap of the rows reads: this rank's rows, then given ones, then zeros."""
    inside = (column < columns)[None, :]
    source = tl.load(taps + row * WIDTH + tap, mask=row < rows, other=0).to(tl.int64)
    here = source < rows
    found = tl.load(
        x + source[:, None] * x_row + column[None, :], mask=here[:, None] & inside, other=0.0
    )
    if GIVEN:
        there = (source >= rows) & (source < zero)
        found += tl.load(  # one of both is zero
            given + (source - rows)[:, None] * given_row + column[None, :],
            mask=there[:, None] & inside,
            other=0.0,
        )
    return found


@triton.jit
def _factor(weight, tap: tl.constexpr, column, columns):  # type: ignore[no-untyped-def]
    """[1, C] of a tap."""
    factor = tl.load(weight + tap * columns + column, mask=column < columns, other=0.0)
    return factor.to(tl.float32)[None, :]


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
    GIVEN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([R, C], dtype=tl.float32)
    for tap in tl.static_range(WIDTH):
        read = _tap(
            x, given, taps, tap, row, column, rows, zero, columns, x_row, given_row, WIDTH, GIVEN
        )
        total += _factor(weight, tap, column, columns) * read.to(tl.float32)
    if BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1 + tl.exp(-total))
    tl.store(
        out + row[:, None] * out_row + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
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
    GIVEN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradients before the activation, and these rows' part of those of the weight and the bias.
    A program has BLOCKS blocks of rows, whose sums it makes at its end: each costs a barrier.
    """
    tl.static_assert(WIDTH <= 4)  # WIDEST
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    here = column < columns
    d_0 = tl.zeros([R, C], dtype=tl.float32)
    d_1 = tl.zeros([R, C], dtype=tl.float32)
    d_2 = tl.zeros([R, C], dtype=tl.float32)
    d_3 = tl.zeros([R, C], dtype=tl.float32)
    d_total = tl.zeros([R, C], dtype=tl.float32)
    for block in range(BLOCKS):
        row = (part * BLOCKS + block) * R + tl.arange(0, R)
        both = (row < rows)[:, None] & here[None, :]
        given_slope = tl.load(
            grad + row[:, None] * grad_row + column[None, :], mask=both, other=0.0
        ).to(tl.float32)
        read_0 = _tap(
            x, given, taps, 0, row, column, rows, zero, columns, x_row, given_row, WIDTH, GIVEN
        )
        total = _factor(weight, 0, column, columns) * read_0.to(tl.float32)
        if WIDTH > 1:
            read_1 = _tap(
                x, given, taps, 1, row, column, rows, zero, columns, x_row, given_row, WIDTH, GIVEN
            )
            total += _factor(weight, 1, column, columns) * read_1.to(tl.float32)
        if WIDTH > 2:
            read_2 = _tap(
                x, given, taps, 2, row, column, rows, zero, columns, x_row, given_row, WIDTH, GIVEN
            )
            total += _factor(weight, 2, column, columns) * read_2.to(tl.float32)
        if WIDTH > 3:
            read_3 = _tap(
                x, given, taps, 3, row, column, rows, zero, columns, x_row, given_row, WIDTH, GIVEN
            )
            total += _factor(weight, 3, column, columns) * read_3.to(tl.float32)
        if BIAS:
            total += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)[None, :]
        if SILU:
            share = 1 / (1 + tl.exp(-total))
            given_slope = given_slope * share * (1 + total * (1 - share))
        tl.store(
            slope + row[:, None] * columns + column[None, :],
            given_slope.to(slope.dtype.element_ty),
            mask=both,
        )
        d_0 += given_slope * read_0.to(tl.float32)
        if WIDTH > 1:
            d_1 += given_slope * read_1.to(tl.float32)
        if WIDTH > 2:
            d_2 += given_slope * read_2.to(tl.float32)
        if WIDTH > 3:
            d_3 += given_slope * read_3.to(tl.float32)
        if BIAS:
            d_total += given_slope
    out = d_weight + part * WIDTH * columns + column
    tl.store(out, tl.sum(d_0, 0), mask=here)
    if WIDTH > 1:
        tl.store(out + columns, tl.sum(d_1, 0), mask=here)
    if WIDTH > 2:
        tl.store(out + 2 * columns, tl.sum(d_2, 0), mask=here)
    if WIDTH > 3:
        tl.store(out + 3 * columns, tl.sum(d_3, 0), mask=here)
    if BIAS:
        tl.store(d_bias + part * columns + column, tl.sum(d_total, 0), mask=here)


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
        given = tl.load(
            slope + reader[:, None] * columns + column[None, :],
            mask=(reader < stop)[:, None] & inside,
            other=0.0,
        )
        total += _factor(weight, tap, column, columns) * given.to(tl.float32)
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
        given, by_tap = given.contiguous(), weight.t().contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[_grid(x)](
            x, given, by_tap, by_tap if bias is None else bias, halo.taps, out,
            len(x), len(x) + len(given), x.shape[1], x.stride(0), given.stride(0), out.stride(0),
            WIDTH=weight.shape[1], BIAS=bias is not None, SILU=silu, GIVEN=len(given) > 0,
            R=ROWS, C=COLUMNS,
        )  # fmt: skip
        ctx.save_for_backward(x, given, weight, bias)
        ctx.settings = silu, halo
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, given, weight, bias = ctx.saved_tensors
        silu, halo = ctx.settings
        rows, columns = x.shape
        width, by_tap = weight.shape[1], weight.t().contiguous()
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        slope = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        programs = triton.cdiv(rows, SUMMED_ROWS * SUMMED_BLOCKS)
        parts = torch.empty(programs, width, columns, dtype=torch.float32, device=x.device)
        bias_parts = parts if bias is None else parts.new_empty(programs, columns)
        _slopes[programs, triton.cdiv(columns, COLUMNS)](
            x, given, by_tap, by_tap if bias is None else bias, halo.taps, grad, slope, parts,
            bias_parts, rows, rows + len(given), columns, x.stride(0), given.stride(0),
            grad.stride(0),
            WIDTH=width, BIAS=bias is not None, SILU=silu, GIVEN=len(given) > 0,
            R=SUMMED_ROWS, C=COLUMNS, BLOCKS=SUMMED_BLOCKS, num_warps=SUMMED_WARPS,
        )  # fmt: skip
        dx = torch.empty_like(slope)
        _inputs[_grid(x)](
            slope, by_tap, halo.stops, dx, rows, columns, WIDTH=width, R=ROWS, C=COLUMNS
        )
        d_given = torch.zeros_like(given)
        if len(halo.readers):
            # Few: rows that are read from before their stretch.
            reads = slope[halo.readers].float() * by_tap.float()[halo.reader_taps]
            own = halo.own
            dx.index_add_(0, halo.read[:own], reads[:own].to(dx.dtype))
            d_given.index_add_(0, halo.read[own:] - rows, reads[own:].to(given.dtype))
        d_weight = parts.sum(0).t().to(weight.dtype)
        d_bias = None if bias is None else bias_parts.sum(0).to(bias.dtype)
        return dx, d_given, d_weight, d_bias, None, None


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], ROWS), triton.cdiv(x.shape[1], COLUMNS)
