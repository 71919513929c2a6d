"""Kernels of a recurrence's chunks where each channel of the keys has a decay of its own: what they
need beside those for one decay of a head.

No decay is ever undone, which would overflow: rows are taken in blocks of 16 tokens, and what lies
between an earlier key and a row is split at the beginning of the row's block. Within a block every
pair of tokens has its own decays.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_math import before_inversion, of_chunk, of_token, product, rates, rows, square, tokens


@triton.jit
def _falls(total):  # type: ignore[no-untyped-def]
    """[16, D] -> [16, 16, D]: the decays from token j to token i; 0 where j is later."""
    b = tl.arange(0, 16)
    seen = (b[:, None] >= b[None, :])[:, :, None]
    between = total[:, None, :] - total[None, :, :]
    return tl.where(seen, tl.exp(tl.where(seen, between, 0.0)), 0.0)


@triton.jit(do_not_specialize=["HEADS"])
def channel_sums(  # type: ignore[no-untyped-def]
    g, row_of, length_of, sums, g_row, g_head, HEADS, DK: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Sums of the decays' logarithms from a chunk's beginning, some channels of a program."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, dk = tl.arange(0, C), tl.program_id(2) * BD + tl.arange(0, BD)
    row, here = tokens(row_of, length_of, chunk, i)
    total = tl.cumsum(rows(g, row, g_row, g_head, head, dk, here, DK), 0)
    place = ((chunk * HEADS + head) * C + i[:, None]) * DK + dk[None, :]
    tl.store(sums + place, total, mask=(dk < DK)[None, :])


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def channel_products(  # type: ignore[no-untyped-def]
    q,
    k,
    beta,
    row_of,
    length_of,
    sums,
    p,
    t,
    k_row,
    k_head,
    beta_row,
    HEADS,
    SHARE,
    DK: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of 16 tokens with all of their chunk: scores, decayed, and for deltas what they take out of
    what earlier tokens wrote. Zero for later tokens.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    block, b, dk = tl.program_id(2), tl.arange(0, 16), tl.arange(0, BK)
    at, i, key_head = chunk * HEADS + head, block * 16 + b, head // SHARE
    row, here = tokens(row_of, length_of, chunk, i)
    rate = rates(beta, row, beta_row, head, here)
    start = of_token(sums, at, block * 16, dk, DK, C)
    fallen = tl.exp(of_chunk(sums, at, i, dk, DK, C) - start[None, :])
    queries = rows(q, row, k_row, k_head, key_head, dk, here, DK) * fallen
    own = rows(k, row, k_row, k_head, key_head, dk, here, DK) * fallen
    for before in range(0, block):
        j = before * 16 + b
        other_row, there = tokens(row_of, length_of, chunk, j)
        keys = rows(k, other_row, k_row, k_head, key_head, dk, there, DK)
        keys = keys * tl.exp(start[None, :] - of_chunk(sums, at, j, dk, DK, C))
        tl.store(p + square(at, i, j, C), product(queries, tl.trans(keys), PRECISION))
        if DELTA:
            alike = product(own, tl.trans(keys), PRECISION) * rate[:, None]
            tl.store(t + square(at, i, j, C), alike)
    near = tl.zeros([16, 16], dtype=tl.float32)
    alike = tl.zeros([16, 16], dtype=tl.float32)
    for begin in range(0, DK, BD):
        d = begin + tl.arange(0, BD)
        keys = rows(k, row, k_row, k_head, key_head, d, here, DK)
        falls = _falls(of_chunk(sums, at, i, d, DK, C)) * keys[None, :, :]
        some = rows(q, row, k_row, k_head, key_head, d, here, DK)
        near += tl.sum(some[:, None, :] * falls, 2)
        if DELTA:
            alike += tl.sum(keys[:, None, :] * falls, 2)
    tl.store(p + square(at, i, i, C), near)
    if DELTA:
        alike = tl.where(b[:, None] > b[None, :], alike, 0.0) * rate[:, None]
        tl.store(t + square(at, i, i, C), alike)
    nothing = tl.zeros([16, 16], dtype=tl.float32)
    for later in range(block + 1, C // 16):
        tl.store(p + square(at, i, later * 16 + b, C), nothing)
        if DELTA:
            tl.store(t + square(at, i, later * 16 + b, C), nothing)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def channel_squares(  # type: ignore[no-untyped-def]
    k,
    beta,
    row_of,
    length_of,
    sums,
    t,
    d_keys_in,
    d_w,
    d_solved,
    d_last,
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
    """In place, from `chunk_value_gradients`: `d_last` becomes the gradients of the sums at the
    chunk's end by what is decayed to there; for deltas `d_w` those of keys as they are decayed and
    rated, and `d_solved` those of the products of keys with keys. IN_BLOCKS: as in
    `before_inversion`.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, i = chunk * HEADS + head, tl.arange(0, C)
    row, here = tokens(row_of, length_of, chunk, i)
    rate = rates(beta, row, beta_row, head, here)
    pairs = square(at, i, i, C)
    total_solved = tl.zeros([C, C], dtype=tl.float32)
    if DELTA:
        solved = tl.load(t + pairs)
        total_solved += tl.load(d_solved + pairs)
    for begin in range(0, DK, BD):
        dk = begin + tl.arange(0, BD)
        keys = rows(k, row, k_row, k_head, head // SHARE, dk, here, DK)
        total = of_chunk(sums, at, i, dk, DK, C)
        last = of_token(sums, at, C - 1, dk, DK, C)
        ended = rows(d_keys_in, row, HEADS * DK, DK, head, dk, here, DK) * keys
        ended = tl.sum(ended * tl.exp(last[None, :] - total), 0)
        given = tl.load(d_last + at * DK + dk, mask=dk < DK, other=0.0)
        # Written over what other warps may not have read yet.
        tl.debug_barrier()
        tl.store(d_last + at * DK + dk, given * tl.exp(last) + ended, mask=dk < DK)
        if DELTA:
            reads = of_chunk(d_w, at, i, dk, DK, C)
            scaled = keys * tl.exp(total) * rate[:, None]
            total_solved += product(reads, tl.trans(scaled), PRECISION)
            given_back = product(tl.trans(solved), reads, PRECISION)
            tl.debug_barrier()
            place = (at * C + i[:, None]) * DK + dk[None, :]
            tl.store(d_w + place, given_back, mask=(dk < DK)[None, :])
    if DELTA:
        d_lower = before_inversion(total_solved, solved, t, d_solved, at, i, C, IN_BLOCKS)
        tl.debug_barrier()
        tl.store(d_solved + pairs, d_lower)


@triton.jit(do_not_specialize=["HEADS", "SHARE"])
def channel_gradients(  # type: ignore[no-untyped-def]
    q,
    k,
    beta,
    row_of,
    length_of,
    sums,
    dq,
    dk_out,
    dg,
    d_beta,
    d_scaled,
    d_scores,
    d_lower,
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
    """From `channel_squares`, in place, of 16 tokens: gradients of queries, keys and rates, and in
    `dg` those of the sums of logarithms, without what is decayed to the chunk's end.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    block, b = tl.program_id(2), tl.arange(0, 16)
    at, i, key_head = chunk * HEADS + head, block * 16 + b, head // SHARE
    row, here = tokens(row_of, length_of, chunk, i)
    rate = rates(beta, row, beta_row, head, here)
    d_rate = tl.load(d_beta + row * HEADS + head, mask=here, other=0.0)
    for begin in range(0, DK, BD):
        dk = begin + tl.arange(0, BD)
        total = of_chunk(sums, at, i, dk, DK, C)
        queries = rows(q, row, k_row, k_head, key_head, dk, here, DK)
        keys = rows(k, row, k_row, k_head, key_head, dk, here, DK)
        # By earlier tokens: of queries and of keys that take out; by later ones: of keys.
        by_scores = tl.zeros([16, BD], dtype=tl.float32)
        by_lower = tl.zeros([16, BD], dtype=tl.float32)
        later = tl.zeros([16, BD], dtype=tl.float32)
        start = of_token(sums, at, block * 16, dk, DK, C)
        for before in range(0, block):
            j = before * 16 + b
            other_row, there = tokens(row_of, length_of, chunk, j)
            other = rows(k, other_row, k_row, k_head, key_head, dk, there, DK)
            other = other * tl.exp(start[None, :] - of_chunk(sums, at, j, dk, DK, C))
            by_scores += product(tl.load(d_scores + square(at, i, j, C)), other, PRECISION)
            if DELTA:
                by_lower += product(tl.load(d_lower + square(at, i, j, C)), other, PRECISION)
        by_scores = by_scores * tl.exp(total - start[None, :])
        by_lower = by_lower * tl.exp(total - start[None, :])
        for after in range(block + 1, C // 16):
            j = after * 16 + b
            other_row, there = tokens(row_of, length_of, chunk, j)
            its_start = of_token(sums, at, after * 16, dk, DK, C)
            fallen = tl.exp(of_chunk(sums, at, j, dk, DK, C) - its_start[None, :])
            slopes = tl.trans(tl.load(d_scores + square(at, j, i, C)))
            other = rows(q, other_row, k_row, k_head, key_head, dk, there, DK) * fallen
            part = product(slopes, other, PRECISION)
            if DELTA:
                slopes = tl.load(d_lower + square(at, j, i, C))
                slopes = slopes * rates(beta, other_row, beta_row, head, there)[:, None]
                other = rows(k, other_row, k_row, k_head, key_head, dk, there, DK) * fallen
                part += product(tl.trans(slopes), other, PRECISION)
            later += part * tl.exp(its_start[None, :] - total)
        falls = _falls(total)
        slopes = tl.load(d_scores + square(at, i, i, C))[:, :, None] * falls
        by_scores += tl.sum(slopes * keys[None, :, :], 1)
        later += tl.sum(slopes * queries[:, None, :], 0)
        if DELTA:
            slopes = tl.load(d_lower + square(at, i, i, C))[:, :, None] * falls
            by_lower += tl.sum(slopes * keys[None, :, :], 1)
            later += tl.sum(slopes * (keys * rate[:, None])[:, None, :], 0)
        inside = here[:, None] & (dk < DK)[None, :]
        results = (row[:, None] * HEADS + head) * DK + dk[None, :]
        begun = tl.exp(total)
        last = of_token(sums, at, C - 1, dk, DK, C)
        d_queries = tl.load(dq + results, mask=inside, other=0.0) * begun + by_scores
        d_keys = tl.load(dk_out + results, mask=inside, other=0.0)
        d_keys = d_keys * tl.exp(last[None, :] - total) + later
        d_total = queries * d_queries - keys * d_keys
        if DELTA:
            by_lower += of_chunk(d_scaled, at, i, dk, DK, C) * begun
            d_rate += tl.sum(by_lower * keys, 1)
            by_lower = by_lower * rate[:, None]
            d_keys += by_lower
            d_total += keys * by_lower
        # Written over what other warps may not have read yet.
        tl.debug_barrier()
        tl.store(dq + results, d_queries, mask=inside)
        tl.store(dk_out + results, d_keys, mask=inside)
        tl.store(dg + results, d_total, mask=inside)
    tl.debug_barrier()
    tl.store(d_beta + row * HEADS + head, d_rate, mask=here)


@triton.jit(do_not_specialize=["HEADS"])
def channel_decays(  # type: ignore[no-untyped-def]
    dg, d_last, row_of, length_of, HEADS, DK: tl.constexpr, C: tl.constexpr, BD: tl.constexpr
):
    """In place: gradients of sums of logarithms become those of the logarithms, the sums of what
    comes at and after each token.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, dk = tl.arange(0, C), tl.program_id(2) * BD + tl.arange(0, BD)
    row, here = tokens(row_of, length_of, chunk, i)
    d_total = rows(dg, row, HEADS * DK, DK, head, dk, here, DK)
    at_end = tl.load(d_last + (chunk * HEADS + head) * DK + dk, mask=dk < DK, other=0.0)
    d_decay = at_end[None, :] + tl.sum(d_total, 0)[None, :] - tl.cumsum(d_total, 0) + d_total
    # Written over what other warps may not have read yet.
    tl.debug_barrier()
    results = (row[:, None] * HEADS + head) * DK + dk[None, :]
    tl.store(dg + results, d_decay, mask=here[:, None] & (dk < DK)[None, :])
