"""Kernels of a recurrence's chunks, backward. A program has one chunk of one head, but for
`chunk_reverse`, which goes through the gradients of a stretch's states from its last chunk on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_math import (
    before_inversion,
    decay,
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


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_output_gradients(  # type: ignore[no-untyped-def]
    q,
    k,
    grad,
    row_of,
    length_of,
    sums,
    p,
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
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the states before the chunks and of what is written, by the outputs alone."""
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
        slope = rows(grad, row, grad_row, grad_head, head, dv, here, DV)
        tl.store(
            d_states + at * DK * DV + dk[:, None] * DV + dv[None, :],
            product(tl.trans(queries), slope, PRECISION),
            mask=(dk < DK)[:, None] & columns,
        )
        tl.store(
            d_written + (at * C + i[:, None]) * DV + dv[None, :],
            product(tl.trans(pairs), slope, PRECISION),
            mask=columns,
        )


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_reverse(  # type: ignore[no-untyped-def]
    k,
    row_of,
    length_of,
    sums,
    w,
    d_states,
    d_written,
    d_ends,
    d_start,
    after,
    d_values,
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
    CHANNELS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """KEEP: store gradients of the states after the chunks, and of all that is written. Not in
    place: that takes a barrier, with which Triton loads no chunk ahead.
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
        at = chunk * HEADS + head
        row, here = tokens(row_of, length_of, chunk, i)
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        keys, whole = left(keys, sums, at, i, dk, DK, C, CHANNELS)
        given = of_chunk(d_written, at, i, dv, DV, C)
        given += product(keys, slope, PRECISION)
        before = tl.load(d_states + at * size + place, mask=both, other=0.0)
        if KEEP:
            values = (at * C + i[:, None]) * DV + dv[None, :]
            tl.store(d_values + values, given, mask=(dv < DV)[None, :])
            tl.store(after + at * size + place, slope, mask=both)
        slope = before + slope * whole
        if DELTA:
            reads = of_chunk(w, at, i, dk, DK, C)
            slope -= product(tl.trans(reads), given, PRECISION)
    tl.store(d_start + (fragment * HEADS + head) * size + place, slope, mask=both)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_value_gradients(  # type: ignore[no-untyped-def]
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
    skip,
    dq,
    dk_out,
    dv_out,
    d_beta,
    d_skip_out,
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
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of values, and by them of what the other inputs make: queries and keys as they are
    decayed, scores, the inverse, and what is taken out of states.

    PARTS: 1, or 3 for values that are read three times and sums that are made one after another,
    so that they fit in registers. BK may be some of the keys for the same reason.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, i, dk = chunk * HEADS + head, tl.arange(0, C), tl.arange(0, BK)
    row, here = tokens(row_of, length_of, chunk, i)
    rate = rates(beta, row, beta_row, head, here)
    for block in tl.static_range((DK + BK - 1) // BK):
        d_qd = tl.zeros([C, BK], dtype=tl.float32)
        d_kd = tl.zeros([C, BK], dtype=tl.float32)
        d_w = tl.zeros([C, BK], dtype=tl.float32)
        if block == 0:  # what does not depend on keys is computed beside the first of them
            d_scores = tl.zeros([C, C], dtype=tl.float32)
            d_solved = tl.zeros([C, C], dtype=tl.float32)
            d_rate = tl.zeros([C], dtype=tl.float32)
        if block == 0 or CHANNELS:
            d_last = tl.zeros([BK], dtype=tl.float32)
        if block == 0:
            d_skip = tl.zeros([C], dtype=tl.float32)
            if DELTA:
                solved = tl.load(t + square(at, i, i, C))
        for part in tl.static_range(PARTS):
            for begin in range(0, DV, BV):
                dv = begin + tl.arange(0, BV)
                columns = (dv < DV)[None, :]
                inside = here[:, None] & columns
                state_place = at * DK * DV + dk[:, None] * DV + dv[None, :]
                both = (dk < DK)[:, None] & columns
                state = tl.load(states + state_place, mask=both, other=0.0)
                slope_after = tl.load(after + state_place, mask=both, other=0.0)
                d_values = of_chunk(d_written, at, i, dv, DV, C)
                slope = rows(grad, row, grad_row, grad_head, head, dv, here, DV)
                value = rows(v, row, v_row, v_head, head, dv, here, DV)
                values = value * rate[:, None]
                if DELTA:
                    values = of_chunk(written, at, i, dv, DV, C)
                if part == 0:
                    d_last += tl.sum(slope_after * state, 1)
                    d_qd += product(slope, tl.trans(state), PRECISION)
                if part == PARTS // 2:
                    d_kd += product(values, tl.trans(slope_after), PRECISION)
                    if block == 0:
                        d_scores += product(slope, tl.trans(values), PRECISION)
                if part == PARTS - 1:
                    if DELTA:
                        d_w -= product(d_values, tl.trans(state), PRECISION)
                    if block == 0:
                        if DELTA:
                            rated = value * rate[:, None]
                            d_solved += product(d_values, tl.trans(rated), PRECISION)
                            d_values = product(tl.trans(solved), d_values, PRECISION)
                        d_rate += tl.sum(d_values * value, 1)
                        d_value = d_values * rate[:, None]
                        if SKIP:
                            d_skip += tl.sum(slope * value, 1)
                            d_value += slope * tl.load(skip + head).to(tl.float32)
                        tl.store(
                            dv_out + (row[:, None] * HEADS + head) * DV + dv[None, :],
                            d_value.to(dv_out.dtype.element_ty),
                            mask=inside,
                        )
        results = (row[:, None] * HEADS + head) * DK + dk[None, :]
        of_keys = (dk < DK)[None, :]
        pairs = square(at, i, i, C)
        tl.store(dq + results, d_qd, mask=here[:, None] & of_keys)
        tl.store(dk_out + results, d_kd, mask=here[:, None] & of_keys)
        if block == 0:
            tl.store(d_beta + row * HEADS + head, d_rate, mask=here)
            tl.store(d_scores_out + pairs, d_scores)
            if SKIP:
                tl.store(d_skip_out + at, tl.sum(d_skip, 0))
        if CHANNELS:
            tl.store(d_last_out + at * DK + dk, d_last, mask=dk < DK)
        elif (block + 1) * BK >= DK:
            tl.store(d_last_out + at, tl.sum(d_last, 0))
        if DELTA:
            tl.store(d_w_out + (at * C + i[:, None]) * DK + dk[None, :], d_w, mask=of_keys)
            if block == 0:
                tl.store(d_solved_out + pairs, d_solved)
        dk += BK


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def chunk_key_gradients(  # type: ignore[no-untyped-def]
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
    IN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From `chunk_value_gradients`, in place, to the gradients of queries, keys, decays and rates.
    Those of queries and keys are of each head of the values.

    IN_BLOCKS: as in `before_inversion`, which writes over `d_solved_in`.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, i = chunk * HEADS + head, tl.arange(0, C)
    row, here = tokens(row_of, length_of, chunk, i)
    total = tl.load(sums + at * C + i)
    last = tl.sum(tl.where(i == C - 1, total, 0.0), 0)
    rate = rates(beta, row, beta_row, head, here)
    pairs = square(at, i, i, C)
    begun, ending = tl.exp(total), tl.exp(last - total)
    falls = decay(total, C, 0)
    # Squares of tokens, from all columns of queries and keys.
    alike_queries = tl.zeros([C, C], dtype=tl.float32)
    alike = tl.zeros([C, C], dtype=tl.float32)
    d_solved = tl.zeros([C, C], dtype=tl.float32)
    for begin in range(0, DK, BD):
        dk = begin + tl.arange(0, BD)
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        queries = rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
        alike_queries += product(queries, tl.trans(keys), PRECISION)
        if DELTA:
            alike += product(keys, tl.trans(keys), PRECISION)
            d_w = of_chunk(d_w_in, at, i, dk, DK, C)
            scaled = keys * (begun * rate)[:, None]
            d_solved += product(d_w, tl.trans(scaled), PRECISION)
    d_scores = tl.load(d_scores_in + pairs) * falls
    products = alike_queries * d_scores
    d_total = tl.sum(products, 1) - tl.sum(products, 0)
    d_rate = tl.load(d_beta + row * HEADS + head, mask=here, other=0.0)
    d_alike = tl.zeros([C, C], dtype=tl.float32)
    if DELTA:
        d_solved += tl.load(d_solved_in + pairs)
        solved = tl.load(t + pairs)
        d_lower = before_inversion(d_solved, solved, t, d_solved_in, at, i, C, IN_BLOCKS) * falls
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
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        queries = rows(q, row, k_row, k_head, head // SHARE, dk, here, DK)
        d_queries = tl.load(dq + results, mask=inside, other=0.0)
        d_total += tl.sum(d_queries * queries, 1) * begun
        d_queries = d_queries * begun[:, None]
        d_queries += product(d_scores, keys, PRECISION)
        d_keys = tl.load(dk_out + results, mask=inside, other=0.0)
        ended += tl.sum(d_keys * keys, 1) * ending
        d_keys = d_keys * ending[:, None]
        d_keys += product(tl.trans(d_scores), queries, PRECISION)
        if DELTA:
            d_w = of_chunk(d_w_in, at, i, dk, DK, C)
            if IN_BLOCKS:  # read again, which takes registers for a shorter time
                solved = tl.load(t + pairs)
            d_scaled = product(tl.trans(solved), d_w, PRECISION)
            d_keys += d_scaled * (begun * rate)[:, None]
            along = tl.sum(d_scaled * keys, 1) * begun
            d_rate += along
            d_total += along * rate
            d_keys += product(d_alike, keys, PRECISION)
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
