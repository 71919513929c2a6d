"""Chunks of a recurrence in Triton: what `chunked` computes with PyTorch, for one decay of a head.

A program has one chunk of one head, but for the two that go through the states of a stretch, chunk
after chunk. Tokens are read where they lie; nothing is laid out in chunks but what is computed.
Products are of TF32, rounded to the nearest, with sums in fp32; the inverse is of three TF32
products. A bf16 model's own rounding is four times as large.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fragments import Chunks

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """fp32 -> the nearest TF32. Tensor cores leave out the last bits of what they read, which makes
    every product a little too small and its error four times as large.
    """
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _product(x, y, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if PRECISION == "tf32":
        x, y = _rounded(x), _rounded(y)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _rows(x, row, x_row, x_head, head, column, here, size):  # type: ignore[no-untyped-def]
    """[C, B] some columns of a head's vectors of these tokens, in fp32; 0 where there is none."""
    place = row[:, None] * x_row + head * x_head + column[None, :]
    inside = here[:, None] & (column < size)[None, :]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_chunk(x, at, i, column, size, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """[C, B] some columns of what is stored of a chunk's tokens; 0 where there is none."""
    place = (at * C + i[:, None]) * size + column[None, :]
    return tl.load(x + place, mask=(column < size)[None, :], other=0.0)


@triton.jit
def _decay(sums, size: tl.constexpr, apart: tl.constexpr):  # type: ignore[no-untyped-def]
    """[C] -> [C, C]: the decay from token j to token i; 0 unless i is `apart` after j or later."""
    i = tl.arange(0, size)
    seen = i[:, None] - i[None, :] >= apart
    return tl.where(seen, tl.exp(tl.where(seen, sums[:, None] - sums[None, :], 0.0)), 0.0)


@triton.jit
def _inverse(lower):  # type: ignore[no-untyped-def]
    """[16, 16] -> the inverse of I + lower: those of blocks on the diagonal, merged two by two."""
    i = tl.arange(0, 16)
    out = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for level in tl.static_range(4):
        block_i, block_j = i[:, None] >> level, i[None, :] >> level
        given = tl.where((block_i == block_j + 1) & (block_i % 2 == 1), lower, 0.0)
        if level == 0:  # noqa: SIM108
            out = out - given
        else:
            out = out - _exact(_exact(out, given), out)
    return out


@triton.jit
def _exact(x, y):  # type: ignore[no-untyped-def]
    """A product of nearly float32's precision."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit(do_not_specialize=["HEADS"])
def _invert(t, HEADS, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """In place: I + a strictly lower triangular matrix becomes its inverse, in the blocks of 16 on
    the diagonal; a program has one.
    """
    at = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    i = tl.arange(0, 16)
    block = t + at * C * C + tl.program_id(2) * 16 * (C + 1) + i[:, None] * C + i[None, :]
    lower = tl.load(block)
    # Written over what other warps may not have read yet.
    tl.debug_barrier()
    tl.store(block, _inverse(lower))


@triton.jit(do_not_specialize=["HEADS"])
def _merge(t, HEADS, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """In place: the blocks below the diagonal of an inverse, from those on it. What lies above the
    diagonal stays.
    """
    tl.static_assert(C == 64)
    at = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    i = tl.arange(0, 16)
    block = t + at * C * C + i[:, None] * C + i[None, :]
    down: tl.constexpr = 16 * C
    t0, t1 = tl.load(block), tl.load(block + down + 16)
    t2, t3 = tl.load(block + 2 * down + 32), tl.load(block + 3 * down + 48)
    l10, l21 = tl.load(block + down), tl.load(block + 2 * down + 16)
    l32 = tl.load(block + 3 * down + 32)
    l20, l31 = tl.load(block + 2 * down), tl.load(block + 3 * down + 16)
    l30 = tl.load(block + 3 * down)
    t10 = -_exact(t1, _exact(l10, t0))
    t21 = -_exact(t2, _exact(l21, t1))
    t32 = -_exact(t3, _exact(l32, t2))
    t20 = -_exact(t2, _exact(l20, t0) + _exact(l21, t10))
    t31 = -_exact(t3, _exact(l31, t1) + _exact(l32, t21))
    t30 = -_exact(t3, _exact(l30, t0) + _exact(l31, t10) + _exact(l32, t20))
    # Written over what other warps may not have read yet.
    tl.debug_barrier()
    tl.store(block + down, t10)
    tl.store(block + 2 * down + 16, t21)
    tl.store(block + 3 * down + 32, t32)
    tl.store(block + 2 * down, t20)
    tl.store(block + 3 * down + 16, t31)
    tl.store(block + 3 * down, t30)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _lower(  # type: ignore[no-untyped-def]
    k,
    g,
    beta,
    row_of,
    length_of,
    sums,
    t,
    k_row,
    k_head,
    g_row,
    beta_row,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of the decays' logarithms; for deltas, what each token takes out of what earlier ones of
    its chunk wrote, [C, C].
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    here = i < length
    row = first + i
    decay = tl.load(g + row * g_row + head, mask=here, other=0.0).to(tl.float32)
    total = tl.cumsum(decay, 0)
    at = chunk * HEADS + head
    tl.store(sums + at * C + i, total)
    if DELTA:
        keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        rate = tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)
        lower = _product(keys, tl.trans(keys), PRECISION)
        lower = lower * _decay(total, C, 1) * rate[:, None]
        tl.store(t + (at * C + i[:, None]) * C + i[None, :], lower)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _solve(  # type: ignore[no-untyped-def]
    k,
    v,
    beta,
    row_of,
    length_of,
    sums,
    w,
    u,
    t,
    k_row,
    k_head,
    v_row,
    v_head,
    beta_row,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the tokens of a chunk take out of the state before it, and what they write without."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
    i = tl.arange(0, C)
    here = i < length
    row = first + i
    at = chunk * HEADS + head
    grown = tl.exp(tl.load(sums + at * C + i))
    rate = tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)
    solved = tl.load(t + (at * C + i[:, None]) * C + i[None, :])
    for begin in range(0, DK, BK):
        dk = begin + tl.arange(0, BK)
        inside = (dk < DK)[None, :]
        keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        reads = _product(solved, keys * (grown * rate)[:, None], PRECISION)
        tl.store(w + (at * C + i[:, None]) * DK + dk[None, :], reads, mask=inside)
    for begin in range(0, DV, BV):
        dv = begin + tl.arange(0, BV)
        inside = (dv < DV)[None, :]
        values = _rows(v, row, v_row, v_head, head, dv, here, DV)
        writes = _product(solved, values * rate[:, None], PRECISION)
        tl.store(u + (at * C + i[:, None]) * DV + dv[None, :], writes, mask=inside)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _scan(  # type: ignore[no-untyped-def]
    k,
    v,
    beta,
    row_of,
    length_of,
    sums,
    w,
    u,
    start,
    states,
    written,
    ends,
    step_of,
    count_of,
    k_row,
    k_head,
    v_row,
    v_head,
    beta_row,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    KEEP: tl.constexpr,
    VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """KEEP: store the states before the chunks and what is written. VALUES: there are values; else
    the state is only carried on.
    """
    fragment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.program_id(2) * BV + tl.arange(0, BV)
    both = (dk < DK)[:, None] & (dv < DV)[None, :]
    place = dk[:, None] * DV + dv[None, :]
    size = DK * DV
    state = tl.load(start + (fragment * HEADS + head) * size + place, mask=both, other=0.0)
    for step in range(tl.load(count_of + fragment)):
        chunk = tl.load(step_of + step).to(tl.int64) + fragment
        first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
        here = i < length
        row = first + i
        at = chunk * HEADS + head
        total = tl.load(sums + at * C + i)
        last = tl.load(sums + at * C + C - 1)
        keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        if KEEP:
            tl.store(states + at * size + place, state, mask=both)
        values = tl.zeros([C, BV], dtype=tl.float32)
        if VALUES:
            if DELTA:
                values = _of_chunk(u, at, i, dv, DV, C)
            else:
                rate = tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)
                values = _rows(v, row, v_row, v_head, head, dv, here, DV) * rate[:, None]
        if DELTA:
            reads = _of_chunk(w, at, i, dk, DK, C)
            values -= _product(reads, state, PRECISION)
            if KEEP:
                tl.store(
                    written + (at * C + i[:, None]) * DV + dv[None, :],
                    values,
                    mask=(dv < DV)[None, :],
                )
        keys = keys * tl.exp(last - total)[:, None]
        state = state * tl.exp(last)
        if DELTA or VALUES:
            state += _product(tl.trans(keys), values, PRECISION)
    tl.store(ends + (fragment * HEADS + head) * size + place, state, mask=both)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _outputs(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    beta,
    row_of,
    length_of,
    sums,
    states,
    written,
    out,
    k_row,
    k_head,
    v_row,
    v_head,
    beta_row,
    out_row,
    out_head,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    here = i < length
    row = first + i
    at = chunk * HEADS + head
    total = tl.load(sums + at * C + i)
    queries = _rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
    keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
    scores = _product(queries, tl.trans(keys), PRECISION) * _decay(total, C, 0)
    queries = queries * tl.exp(total)[:, None]
    for begin in range(0, DV, BV):
        dv = begin + tl.arange(0, BV)
        columns = (dv < DV)[None, :]
        if DELTA:
            values = _of_chunk(written, at, i, dv, DV, C)
        else:
            rate = tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)
            values = _rows(v, row, v_row, v_head, head, dv, here, DV) * rate[:, None]
        state = tl.load(
            states + at * DK * DV + dk[:, None] * DV + dv[None, :],
            mask=(dk < DK)[:, None] & columns,
            other=0.0,
        )
        result = _product(queries, state, PRECISION)
        result += _product(scores, values, PRECISION)
        tl.store(
            out + row[:, None] * out_row + head * out_head + dv[None, :],
            result.to(out.dtype.element_ty),
            mask=here[:, None] & columns,
        )


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _output_gradients(  # type: ignore[no-untyped-def]
    q,
    k,
    grad,
    row_of,
    length_of,
    sums,
    d_states,
    d_written,
    k_row,
    k_head,
    grad_row,
    grad_head,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the states before the chunks and of what is written, by the outputs alone."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    here = i < length
    row = first + i
    at = chunk * HEADS + head
    total = tl.load(sums + at * C + i)
    queries = _rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
    keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
    scores = _product(queries, tl.trans(keys), PRECISION) * _decay(total, C, 0)
    queries = queries * tl.exp(total)[:, None]
    for begin in range(0, DV, BV):
        dv = begin + tl.arange(0, BV)
        columns = (dv < DV)[None, :]
        slope = _rows(grad, row, grad_row, grad_head, head, dv, here, DV)
        tl.store(
            d_states + at * DK * DV + dk[:, None] * DV + dv[None, :],
            _product(tl.trans(queries), slope, PRECISION),
            mask=(dk < DK)[:, None] & columns,
        )
        tl.store(
            d_written + (at * C + i[:, None]) * DV + dv[None, :],
            _product(tl.trans(scores), slope, PRECISION),
            mask=columns,
        )


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _reverse(  # type: ignore[no-untyped-def]
    k,
    row_of,
    length_of,
    sums,
    w,
    d_states,
    d_written,
    d_ends,
    d_start,
    step_of,
    count_of,
    k_row,
    k_head,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """In place: `d_states` becomes the gradients of the states after the chunks, `d_written` those
    of all that is written.
    """
    fragment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.program_id(2) * BV + tl.arange(0, BV)
    both = (dk < DK)[:, None] & (dv < DV)[None, :]
    place = dk[:, None] * DV + dv[None, :]
    size = DK * DV
    slope = tl.load(d_ends + (fragment * HEADS + head) * size + place, mask=both, other=0.0)
    count = tl.load(count_of + fragment)
    for back in range(count):
        chunk = tl.load(step_of + count - 1 - back).to(tl.int64) + fragment
        first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
        here = i < length
        row = first + i
        at = chunk * HEADS + head
        total = tl.load(sums + at * C + i)
        last = tl.load(sums + at * C + C - 1)
        keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        keys = keys * tl.exp(last - total)[:, None]
        values = d_written + (at * C + i[:, None]) * DV + dv[None, :]
        columns = (dv < DV)[None, :]
        given = tl.load(values, mask=columns, other=0.0)
        given += _product(keys, slope, PRECISION)
        before = tl.load(d_states + at * size + place, mask=both, other=0.0)
        # Written over what other warps may not have read yet.
        tl.debug_barrier()
        tl.store(values, given, mask=columns)
        tl.store(d_states + at * size + place, slope, mask=both)
        slope = before + slope * tl.exp(last)
        if DELTA:
            reads = _of_chunk(w, at, i, dk, DK, C)
            slope -= _product(tl.trans(reads), given, PRECISION)
    tl.store(d_start + (fragment * HEADS + head) * size + place, slope, mask=both)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _value_gradients(  # type: ignore[no-untyped-def]
    v,
    beta,
    grad,
    row_of,
    length_of,
    t,
    states,
    written,
    after,
    d_written,
    dq,
    dk_out,
    dv_out,
    d_beta,
    d_w_out,
    d_scores_out,
    d_solved_out,
    d_last_out,
    v_row,
    v_head,
    beta_row,
    grad_row,
    grad_head,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of values, and by them of what the other inputs make: queries and keys as they are
    decayed, scores, the inverse, and what is taken out of states.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    here = i < length
    row = first + i
    at = chunk * HEADS + head
    rate = tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)
    d_qd = tl.zeros([C, BK], dtype=tl.float32)
    d_kd = tl.zeros([C, BK], dtype=tl.float32)
    d_w = tl.zeros([C, BK], dtype=tl.float32)
    d_scores = tl.zeros([C, C], dtype=tl.float32)
    d_solved = tl.zeros([C, C], dtype=tl.float32)
    d_rate = tl.zeros([C], dtype=tl.float32)
    d_last = 0.0
    if DELTA:
        solved = tl.load(t + (at * C + i[:, None]) * C + i[None, :])
    for begin in range(0, DV, BV):
        dv = begin + tl.arange(0, BV)
        columns = (dv < DV)[None, :]
        rows = here[:, None] & columns
        state_place = at * DK * DV + dk[:, None] * DV + dv[None, :]
        both = (dk < DK)[:, None] & columns
        state = tl.load(states + state_place, mask=both, other=0.0)
        slope_after = tl.load(after + state_place, mask=both, other=0.0)
        d_values = _of_chunk(d_written, at, i, dv, DV, C)
        slope = _rows(grad, row, grad_row, grad_head, head, dv, here, DV)
        value = _rows(v, row, v_row, v_head, head, dv, here, DV)
        values = value * rate[:, None]
        if DELTA:
            values = _of_chunk(written, at, i, dv, DV, C)
        d_last += tl.sum(tl.sum(slope_after * state, 1), 0)
        d_qd += _product(slope, tl.trans(state), PRECISION)
        d_kd += _product(values, tl.trans(slope_after), PRECISION)
        d_scores += _product(slope, tl.trans(values), PRECISION)
        if DELTA:
            d_w -= _product(d_values, tl.trans(state), PRECISION)
            d_solved += _product(d_values, tl.trans(value * rate[:, None]), PRECISION)
            d_values = _product(tl.trans(solved), d_values, PRECISION)
        d_rate += tl.sum(d_values * value, 1)
        tl.store(
            dv_out + (row[:, None] * HEADS + head) * DV + dv[None, :],
            (d_values * rate[:, None]).to(dv_out.dtype.element_ty),
            mask=rows,
        )
    results = (row[:, None] * HEADS + head) * DK + dk[None, :]
    inside = here[:, None] & (dk < DK)[None, :]
    square = (at * C + i[:, None]) * C + i[None, :]
    tl.store(dq + results, d_qd, mask=inside)
    tl.store(dk_out + results, d_kd, mask=inside)
    tl.store(d_beta + row * HEADS + head, d_rate, mask=here)
    tl.store(d_scores_out + square, d_scores)
    tl.store(d_last_out + at, d_last)
    if DELTA:
        tl.store(d_w_out + (at * C + i[:, None]) * DK + dk[None, :], d_w, mask=(dk < DK)[None, :])
        tl.store(d_solved_out + square, d_solved)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def _key_gradients(  # type: ignore[no-untyped-def]
    q,
    k,
    beta,
    row_of,
    length_of,
    sums,
    t,
    dq,
    dk_out,
    dg,
    d_beta,
    d_w_in,
    d_scores_in,
    d_solved_in,
    d_last_in,
    k_row,
    k_head,
    beta_row,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From `_value_gradients`, in place, to the gradients of queries, keys, decays and rates. Those
    of queries and keys are of each head of the values.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, length = tl.load(row_of + chunk).to(tl.int64), tl.load(length_of + chunk)
    i = tl.arange(0, C)
    here = i < length
    row = first + i
    at = chunk * HEADS + head
    total = tl.load(sums + at * C + i)
    last = tl.sum(tl.where(i == C - 1, total, 0.0), 0)
    rate = tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)
    square = (at * C + i[:, None]) * C + i[None, :]
    grown, left = tl.exp(total), tl.exp(last - total)
    falls = _decay(total, C, 0)
    # Squares of tokens, from all columns of queries and keys.
    scores = tl.zeros([C, C], dtype=tl.float32)
    alike = tl.zeros([C, C], dtype=tl.float32)
    d_solved = tl.zeros([C, C], dtype=tl.float32)
    for begin in range(0, DK, BD):
        dk = begin + tl.arange(0, BD)
        keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        queries = _rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
        scores += _product(queries, tl.trans(keys), PRECISION)
        if DELTA:
            alike += _product(keys, tl.trans(keys), PRECISION)
            d_w = _of_chunk(d_w_in, at, i, dk, DK, C)
            scaled = keys * (grown * rate)[:, None]
            d_solved += _product(d_w, tl.trans(scaled), PRECISION)
    d_scores = tl.load(d_scores_in + square) * falls
    products = scores * d_scores
    d_total = tl.sum(products, 1) - tl.sum(products, 0)
    d_rate = tl.load(d_beta + row * HEADS + head, mask=here, other=0.0)
    d_alike = tl.zeros([C, C], dtype=tl.float32)
    if DELTA:
        d_solved += tl.load(d_solved_in + square)
        solved = tl.load(t + square)
        d_lower = _exact(tl.trans(solved), d_solved)
        d_lower = -_exact(d_lower, tl.trans(solved))
        d_lower = tl.where(i[:, None] > i[None, :], d_lower, 0.0) * falls
        raw = alike * d_lower
        d_rate += tl.sum(raw, 1)
        raw = raw * rate[:, None]
        d_total += tl.sum(raw, 1) - tl.sum(raw, 0)
        d_lower = d_lower * rate[:, None]
        d_alike = d_lower + tl.trans(d_lower)
    # Columns of queries and keys, from the squares; what was read is written over.
    ended = tl.zeros([C], dtype=tl.float32)
    for begin in range(0, DK, BD):
        dk = begin + tl.arange(0, BD)
        inside = here[:, None] & (dk < DK)[None, :]
        results = (row[:, None] * HEADS + head) * DK + dk[None, :]
        keys = _rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        queries = _rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
        d_queries = tl.load(dq + results, mask=inside, other=0.0)
        d_total += tl.sum(d_queries * queries, 1) * grown
        d_queries = d_queries * grown[:, None]
        d_queries += _product(d_scores, keys, PRECISION)
        d_keys = tl.load(dk_out + results, mask=inside, other=0.0)
        ended += tl.sum(d_keys * keys, 1) * left
        d_keys = d_keys * left[:, None]
        d_keys += _product(tl.trans(d_scores), queries, PRECISION)
        if DELTA:
            d_w = _of_chunk(d_w_in, at, i, dk, DK, C)
            d_scaled = _product(tl.trans(solved), d_w, PRECISION)
            d_keys += d_scaled * (grown * rate)[:, None]
            along = tl.sum(d_scaled * keys, 1) * grown
            d_rate += along
            d_total += along * rate
            d_keys += _product(d_alike, keys, PRECISION)
        # Written over what other warps may not have read yet.
        tl.debug_barrier()
        tl.store(dq + results, d_queries, mask=inside)
        tl.store(dk_out + results, d_keys, mask=inside)
    d_total -= ended
    d_last = tl.load(d_last_in + at) * tl.exp(last) + tl.sum(ended, 0)
    d_total += tl.where(i == C - 1, d_last, 0.0)
    # the sum of what comes at and after each token
    upto = tl.cumsum(d_total, 0)
    d_decay = tl.sum(d_total, 0) - upto + d_total
    tl.debug_barrier()
    tl.store(dg + row * HEADS + head, d_decay, mask=here)
    tl.store(d_beta + row * HEADS + head, d_rate, mask=here)


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


# ---- calls

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


SETTINGS: dict[str, tuple[int, int, int]] = {
    "lower": (4, 1, 32),
    "invert": (1, 1, 16),
    "merge": (1, 1, 16),
    "solve": (4, 1, 16),
    "scan": (8, 2, 32),
    "outputs": (4, 1, 32),
    "output_gradients": (4, 1, 64),
    "reverse": (4, 2, 32),
    "value_gradients": (8, 1, 32),
    "key_gradients": (4, 2, 16),
}
"""Warps and stages of each kernel, and the columns of values (the last: of keys) that it takes at
once: the fastest of those that `benchmarks/recurrent.py tune` tried on a H200.
"""


def runs_on(device: torch.device) -> bool:
    """Whether Triton computes on this device: a CUDA device, or any where it interprets."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@dataclasses.dataclass
class Job:
    """Some heads of a recurrence, and their chunks.

    Attributes:
        q, k: [T, hk, Dk], normalised and scaled.
        v: [T, h, Dv]. g, beta: [T, h].
        delta: the kind of recurrence.
        precision: of products: tf32, or tf32x3, which is near that of float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    chunks: Chunks
    delta: bool
    precision: str = "tf32"

    def __post_init__(self) -> None:
        self.v = self.v if self.v.stride(2) == 1 else self.v.contiguous()
        self.g, self.beta = (x if x.stride(1) == 1 else x.contiguous() for x in (self.g, self.beta))
        if self.q.stride() != self.k.stride() or self.q.stride(2) != 1:
            self.q, self.k = self.q.contiguous(), self.k.contiguous()
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        self.sums = self._new(n, h, c)
        nothing = self._new(1)
        self.w = self._new(n, h, c, self.key_dim) if self.delta else nothing
        self.u = self._new(n, h, c, self.value_dim) if self.delta else nothing
        self.t = self._new(n, h, c, c) if self.delta else nothing
        strides = *self.k.stride()[:2], *self.v.stride()[:2]
        settings = self._settings("lower")
        del settings["BV"]
        _lower[(n, h)](
            self.k, self.g, self.beta, *self._chunk_rows, self.sums, self.t, *strides[:2],
            self.g.stride(0), self.beta.stride(0), *self._sizes[:3], **settings, DELTA=self.delta,
        )  # fmt: skip
        if self.delta:
            _invert[(n, h, c // 16)](self.t, h, C=c, num_warps=SETTINGS["invert"][0])
            _merge[(n, h)](self.t, h, C=c, num_warps=SETTINGS["merge"][0])
            settings = self._settings("solve")
            settings["BK"] = min(settings["BK"], 2 * settings["BV"])
            _solve[(n, h)](
                self.k, self.v, self.beta, *self._chunk_rows, self.sums, self.w, self.u, self.t,
                *strides, self.beta.stride(0), *self._sizes, **settings,
            )  # fmt: skip

    @property
    def heads(self) -> int:
        return self.v.shape[1]

    @property
    def key_dim(self) -> int:
        return self.k.shape[2]

    @property
    def value_dim(self) -> int:
        return self.v.shape[2]

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.heads, self.heads // self.k.shape[1], self.key_dim, self.value_dim

    def _settings(self, kernel: str) -> dict[str, Any]:
        warps, stages, columns = SETTINGS[kernel]
        return {
            "C": self.chunks.size,
            "BK": max(16, triton.next_power_of_2(self.key_dim)),
            "BV": min(max(16, triton.next_power_of_2(self.value_dim)), columns),
            "PRECISION": self.precision,
            "num_warps": warps,
            "num_stages": stages,
        }

    @property
    def _chunk_rows(self) -> tuple[Tensor, Tensor]:
        return self.chunks.first_rows, self.chunks.lengths

    def _new(self, *shape: int) -> Tensor:
        return self.v.new_empty(*shape, dtype=torch.float32)

    def scan(
        self, start: Tensor, keep: bool = True, counts: Tensor | None = None, values: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States before the chunks, what is written, and states after the fragments.

        Args:
            start: [F, h, Dk, X], in the order of the chunks' fragments.
            keep: else only the last are returned.
            counts: chunks of each fragment that are gone through; by default all.
            values: X is Dv; else nothing new is written, and X is any width.
        """
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        wide = start.shape[3]
        states = self._new(n, h, self.key_dim, wide) if keep else start
        written = self._new(n, h, c, wide) if keep and self.delta else start
        ends = torch.empty_like(start)
        settings = self._settings("scan")
        _scan[(len(start), h, triton.cdiv(wide, settings["BV"]))](
            self.k, self.v, self.beta, *self._chunk_rows, self.sums, self.w, self.u, start, states,
            written, ends, self.chunks.step_starts,
            self.chunks.step_counts if counts is None else counts,
            *self.k.stride()[:2], *self.v.stride()[:2], self.beta.stride(0),
            *self._sizes[:3], wide, **settings, DELTA=self.delta, KEEP=keep, VALUES=values,
        )  # fmt: skip
        return states, written, ends

    def outputs(self, states: Tensor, written: Tensor, out: Tensor) -> None:
        """Writes [T, h, Dv]."""
        _outputs[(self.chunks.count, self.heads)](
            self.q, self.k, self.v, self.beta, *self._chunk_rows, self.sums, states, written, out,
            *self.k.stride()[:2], *self.v.stride()[:2], self.beta.stride(0), *out.stride()[:2],
            *self._sizes, **self._settings("outputs"), DELTA=self.delta,
        )  # fmt: skip

    def output_gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of the states before the chunks and of what is written, by the outputs alone."""
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        d_states = self._new(n, h, self.key_dim, self.value_dim)
        d_written = self._new(n, h, c, self.value_dim)
        _output_gradients[(n, h)](
            self.q, self.k, grad, *self._chunk_rows, self.sums, d_states, d_written,
            *self.k.stride()[:2], *grad.stride()[:2],
            *self._sizes, **self._settings("output_gradients"),
        )  # fmt: skip
        return d_states, d_written

    def reverse(self, d_states: Tensor, d_written: Tensor, d_ends: Tensor) -> Tensor:
        """Makes them, in place, gradients of the states after the chunks and of all that is
        written. Returns those of the fragments' first states.
        """
        d_start = torch.empty_like(d_ends)
        settings = self._settings("reverse")
        _reverse[(len(d_ends), self.heads, triton.cdiv(self.value_dim, settings["BV"]))](
            self.k, *self._chunk_rows, self.sums, self.w, d_states, d_written, d_ends, d_start,
            self.chunks.step_starts, self.chunks.step_counts,
            *self.k.stride()[:2], *self._sizes, **settings, DELTA=self.delta,
        )  # fmt: skip
        return d_start

    def input_gradients(
        self, grad: Tensor, states: Tensor, written: Tensor, after: Tensor, d_written: Tensor
    ) -> tuple[Tensor, ...]:
        """Of q, k [T, h, Dk], v [T, h, Dv], g, beta [T, h], fp32 but for v's."""
        rows, h = self.v.shape[:2]
        dq, dk = self._new(rows, h, self.key_dim), self._new(rows, h, self.key_dim)
        dv = self.v.new_empty(rows, h, self.value_dim)
        dg, d_beta = self._new(rows, h), self._new(rows, h)
        n, c = self.chunks.count, self.chunks.size
        d_scores, d_last = self._new(n, h, c, c), self._new(n, h)
        d_solved = torch.empty_like(self.t)
        # What is taken out of the states is not read any more.
        d_w = self.w
        _value_gradients[(n, h)](
            self.v, self.beta, grad, *self._chunk_rows, self.t, states, written, after, d_written,
            dq, dk, dv, d_beta, d_w, d_scores, d_solved, d_last,
            *self.v.stride()[:2], self.beta.stride(0), *grad.stride()[:2],
            *self._sizes, **self._settings("value_gradients"), DELTA=self.delta,
        )  # fmt: skip
        settings = self._settings("key_gradients")
        del settings["BV"]
        settings["BD"] = min(settings.pop("BK"), SETTINGS["key_gradients"][2])
        _key_gradients[(n, h)](
            self.q, self.k, self.beta, *self._chunk_rows, self.sums, self.t, dq, dk, dg, d_beta,
            d_w, d_scores, d_solved, d_last, *self.k.stride()[:2], self.beta.stride(0),
            *self._sizes[:3], **settings, DELTA=self.delta,
        )  # fmt: skip
        return dq, dk, dv, dg, d_beta

    def changes(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """How the fragments at these places of `chunks.order` change a state: what they add to it
        [F, h, Dk, Dv], and the matrix [F, h, Dk, Dk] or number [F, h, 1, 1] before it.
        """
        every, h = len(self.chunks.order), self.heads
        device = self.v.device
        counts = torch.zeros_like(self.chunks.step_counts)
        index = torch.tensor(chosen, device=device)
        counts[index] = self.chunks.step_counts[index]
        zero = self._new(every, h, self.key_dim, self.value_dim).zero_()
        state = self.scan(zero, keep=False, counts=counts)[2][index]
        if not self.delta:
            fragment = self.chunks.fragment_of
            whole = self._new(every, h).zero_()
            whole.index_add_(0, fragment, self.sums[..., -1])
            return state, whole[index].exp()[..., None, None]
        eye = torch.eye(self.key_dim, device=device).expand(every, h, -1, -1).contiguous()
        return state, self.scan(eye, keep=False, counts=counts, values=False)[2][index]
