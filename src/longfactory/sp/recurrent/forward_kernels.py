"""Kernels of a recurrence's chunks, forward. A program has one chunk of one head, but for
`chunk_scan`, which goes through the states of a stretch, chunk after chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_math import (
    decay,
    exact,
    grown,
    left,
    of_chunk,
    product,
    rates,
    rows,
    scores,
    square,
    tokens,
)


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
            out = out - exact(exact(out, given), out)
    return out


@triton.jit(do_not_specialize=["HEADS"])
def chunk_invert(t, HEADS, C: tl.constexpr):  # type: ignore[no-untyped-def]
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
def chunk_merge(t, HEADS, C: tl.constexpr):  # type: ignore[no-untyped-def]
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
    t10 = -exact(t1, exact(l10, t0))
    t21 = -exact(t2, exact(l21, t1))
    t32 = -exact(t3, exact(l32, t2))
    t20 = -exact(t2, exact(l20, t0) + exact(l21, t10))
    t31 = -exact(t3, exact(l31, t1) + exact(l32, t21))
    t30 = -exact(t3, exact(l30, t0) + exact(l31, t10) + exact(l32, t20))
    # Written over what other warps may not have read yet.
    tl.debug_barrier()
    tl.store(block + down, t10)
    tl.store(block + 2 * down + 16, t21)
    tl.store(block + 3 * down + 32, t32)
    tl.store(block + 2 * down, t20)
    tl.store(block + 3 * down + 16, t31)
    tl.store(block + 3 * down, t30)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_lower(  # type: ignore[no-untyped-def]
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
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    row, here = tokens(row_of, length_of, chunk, i)
    total = tl.cumsum(rates(g, row, g_row, head, here), 0)
    at = chunk * HEADS + head
    tl.store(sums + at * C + i, total)
    if DELTA:
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        lower = product(keys, tl.trans(keys), PRECISION)
        lower = lower * decay(total, C, 1) * rates(beta, row, beta_row, head, here)[:, None]
        tl.store(t + square(at, i, i, C), lower)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_solve(  # type: ignore[no-untyped-def]
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
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the tokens of a chunk take out of the state before it, and what they write without."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, i = chunk * HEADS + head, tl.arange(0, C)
    row, here = tokens(row_of, length_of, chunk, i)
    rate = rates(beta, row, beta_row, head, here)
    solved = tl.load(t + square(at, i, i, C))
    for begin in range(0, DK, BK):
        dk = begin + tl.arange(0, BK)
        inside = (dk < DK)[None, :]
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK) * rate[:, None]
        reads = product(solved, grown(keys, sums, at, i, dk, DK, C, CHANNELS), PRECISION)
        tl.store(w + (at * C + i[:, None]) * DK + dk[None, :], reads, mask=inside)
    for begin in range(0, DV, BV):
        dv = begin + tl.arange(0, BV)
        inside = (dv < DV)[None, :]
        values = rows(v, row, v_row, v_head, head, dv, here, DV) * rate[:, None]
        writes = product(solved, values, PRECISION)
        tl.store(u + (at * C + i[:, None]) * DV + dv[None, :], writes, mask=inside)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_scan(  # type: ignore[no-untyped-def]
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
    CHANNELS: tl.constexpr,
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
        at = chunk * HEADS + head
        row, here = tokens(row_of, length_of, chunk, i)
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        keys, whole = left(keys, sums, at, i, dk, DK, C, CHANNELS)
        if KEEP:
            tl.store(states + at * size + place, state, mask=both)
        values = tl.zeros([C, BV], dtype=tl.float32)
        if VALUES:
            if DELTA:
                values = of_chunk(u, at, i, dv, DV, C)
            else:
                rate = rates(beta, row, beta_row, head, here)
                values = rows(v, row, v_row, v_head, head, dv, here, DV) * rate[:, None]
        if DELTA:
            values -= product(of_chunk(w, at, i, dk, DK, C), state, PRECISION)
            if KEEP:
                tl.store(
                    written + (at * C + i[:, None]) * DV + dv[None, :],
                    values,
                    mask=(dv < DV)[None, :],
                )
        state = state * whole
        if DELTA or VALUES:
            state += product(tl.trans(keys), values, PRECISION)
    tl.store(ends + (fragment * HEADS + head) * size + place, state, mask=both)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_outputs(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    beta,
    row_of,
    length_of,
    sums,
    p,
    states,
    written,
    skip,
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
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SKIP: values times their head's number are added."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, i, dk = chunk * HEADS + head, tl.arange(0, C), tl.arange(0, BK)
    row, here = tokens(row_of, length_of, chunk, i)
    queries = rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
    keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
    pairs = scores(queries, keys, sums, p, at, i, C, CHANNELS, PRECISION)
    queries = grown(queries, sums, at, i, dk, DK, C, CHANNELS)
    for begin in range(0, DV, BV):
        dv = begin + tl.arange(0, BV)
        columns = (dv < DV)[None, :]
        if DELTA:
            values = of_chunk(written, at, i, dv, DV, C)
        else:
            rate = rates(beta, row, beta_row, head, here)
            values = rows(v, row, v_row, v_head, head, dv, here, DV) * rate[:, None]
        state = tl.load(
            states + at * DK * DV + dk[:, None] * DV + dv[None, :],
            mask=(dk < DK)[:, None] & columns,
            other=0.0,
        )
        result = product(queries, state, PRECISION)
        result += product(pairs, values, PRECISION)
        if SKIP:
            given = rows(v, row, v_row, v_head, head, dv, here, DV)
            result += given * tl.load(skip + head).to(tl.float32)
        tl.store(
            out + row[:, None] * out_row + head * out_head + dv[None, :],
            result.to(out.dtype.element_ty),
            mask=here[:, None] & columns,
        )
