"""Attention of one tile in Triton: a soft-cap, documents, windows, rectangles, any head dims up to
256, grouped key heads. `tile_calls` calls these kernels.

A query i sees the keys low_i <= j <= high_i: high_i is i, or the last key of a rectangle; low_i is
where its document or its window begins. Blocks of keys that all queries of a block see are computed
without a mask. Scores are kept in base 2: x = q k^T scale / cap, s = cap tanh(x) / ln 2 (without a
cap q k^T scale / ln 2), p = 2^(s - lse / ln 2).

Backward: a program for a block of keys adds up dk and dv over all query heads that share them, and
one for a block of queries adds up dq; nothing is added by atomics, so results are the same bits
every time.

Letters in shapes: M queries and N keys of a block, D and E the head dims of keys and of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Right to 1e-7 of 1, which is what a score is multiplied by."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    base, start, length, rows, stride, offset, cols, BOUND: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """[rows, WIDE] of a head, from row `start` on; WIDTH of its columns are there.

    Args:
        offset: of the head. BOUND: some rows may lie behind `length`.
    """
    index = start + rows
    at = base + offset + index.to(tl.int64)[:, None] * stride + cols[None, :]
    if BOUND:
        return tl.load(at, mask=(index < length)[:, None] & (cols < WIDTH)[None, :], other=0.0)
    if WIDTH < WIDE:
        return tl.load(at, mask=(cols < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    base, values, start, length, rows, stride, offset, cols, WIDTH: tl.constexpr
):
    index = start + rows
    at = base + offset + index.to(tl.int64)[:, None] * stride + cols[None, :]
    there = (index < length)[:, None] & (cols < WIDTH)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=there)


@triton.jit
def _low(  # type: ignore[no-untyped-def]
    i, begins, q_len, reach, PACKED: tl.constexpr, WINDOW: tl.constexpr
):
    """The first key that the queries i see."""
    low = i * 0
    if PACKED:
        low = tl.load(begins + i, mask=i < q_len, other=0)
    if WINDOW:
        low = tl.maximum(low, i - reach)
    return low


@triton.jit
def _forward_block(  # type: ignore[no-untyped-def]
    acc,
    total,
    top,
    q,
    k,
    v,
    i,
    low,
    start,
    stop,
    k_len,
    k_row,
    v_row,
    k_head,
    v_head,
    factor,
    cap,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Adds the keys [start, stop), in blocks of N."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    for first in range(start, stop, N):
        keys = _load(k, first, k_len, n, k_row, k_head, d, MASKED, DIM, D)
        s = tl.dot(q, tl.trans(keys)) * factor
        if CAPPED:
            s = _tanh(s) * cap
        if MASKED:
            j = first + n
            seen = (j[None, :] >= low[:, None]) & (j < k_len)[None, :]
            if CAUSAL:
                seen = seen & (j[None, :] <= i[:, None])
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        scale = tl.exp2(top - shift)
        total = total * scale + tl.sum(p, 1)
        values = _load(v, first, k_len, n, v_row, v_head, e, MASKED, VALUE, E)
        acc = tl.dot(p.to(values.dtype), values, acc * scale[:, None])
        top = new
    return acc, total, top


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    lse,
    begins,
    q_len,
    k_len,
    reach,
    factor,
    cap,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    lse_head,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
):
    # the longest rows first
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    i = start + m
    low = _low(i, begins, q_len, reach, PACKED, WINDOW)
    x = _load(q, start, q_len, m, q_row, head * q_head, d, True, DIM, D)
    acc = tl.zeros([M, E], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    last = tl.minimum(start + M, q_len) - 1
    stop = tl.minimum(last + 1, k_len) if CAUSAL else k_len
    least = tl.maximum(tl.min(tl.where(i < q_len, low, k_len)), 0) // N * N
    # keys that all queries of the block see
    clear = tl.cdiv(tl.max(tl.where(i < q_len, low, 0)), N) * N
    whole = (tl.minimum(start + 1, k_len) if CAUSAL else k_len) // N * N
    clear = tl.minimum(tl.maximum(clear, least), stop)
    whole = tl.maximum(whole, clear)
    kh = head // GROUP * k_head
    vh = head // GROUP * v_head
    if PACKED or WINDOW:
        acc, total, top = _forward_block(
            acc, total, top, x, k, v, i, low, least, clear, k_len, k_row, v_row, kh, vh, factor,
            cap, True, CAUSAL, CAPPED, N, D, E, DIM, VALUE,
        )  # fmt: skip
    acc, total, top = _forward_block(
        acc, total, top, x, k, v, i, low, clear, whole, k_len, k_row, v_row, kh, vh, factor,
        cap, False, CAUSAL, CAPPED, N, D, E, DIM, VALUE,
    )  # fmt: skip
    acc, total, top = _forward_block(
        acc, total, top, x, k, v, i, low, whole, stop, k_len, k_row, v_row, kh, vh, factor,
        cap, True, CAUSAL, CAPPED, N, D, E, DIM, VALUE,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    _store(out, acc, start, q_len, m, out_row, head * out_head, e, VALUE)
    natural = (top + tl.log2(total)) / LOG2_E
    natural = tl.where(total > 0, natural, float("-inf"))
    tl.store(lse + head * lse_head + i, natural, mask=i < q_len)


@triton.jit
def _delta(  # type: ignore[no-untyped-def]
    dout,
    out,
    delta,
    q_len,
    dout_row,
    dout_head,
    out_row,
    out_head,
    M: tl.constexpr,
    E: tl.constexpr,
    VALUE: tl.constexpr,
):
    """delta [H, Sq] = the sum over values of dout * out."""
    start = tl.program_id(0) * M
    head = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, M)
    e = tl.arange(0, E)
    g = _load(dout, start, q_len, m, dout_row, head * dout_head, e, True, VALUE, E).to(tl.float32)
    o = _load(out, start, q_len, m, out_row, head * out_head, e, True, VALUE, E).to(tl.float32)
    i = start + m
    tl.store(delta + head * q_len + i, tl.sum(g * o, 1), mask=i < q_len)


@triton.jit
def _key_block(  # type: ignore[no-untyped-def]
    dk,
    dv,
    keys,
    values,
    q,
    dout,
    lse,
    delta,
    j,
    begins,
    start,
    stop,
    q_len,
    k_len,
    reach,
    factor,
    cap,
    q_row,
    dout_row,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Adds the queries [start, stop) of one head, in blocks of M; scores are transposed, [N, M]."""
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    for first in range(start, stop, M):
        i = first + m
        x = _load(q, first, q_len, m, q_row, 0, d, MASKED, DIM, D)
        s = tl.dot(keys, tl.trans(x)) * factor
        if CAPPED:
            t = _tanh(s)
            s = t * cap
        high = tl.load(lse + i, mask=i < q_len, other=float("inf")) * LOG2_E
        # a query that sees nothing has -inf
        p = tl.exp2(s - tl.where(high == float("-inf"), float("inf"), high)[None, :])
        if MASKED:
            low = _low(i, begins, q_len, reach, PACKED, WINDOW)
            seen = (j[:, None] >= low[None, :]) & (j < k_len)[:, None]
            if CAUSAL:
                seen = seen & (j[:, None] <= i[None, :])
            p = tl.where(seen, p, 0.0)
        g = _load(dout, first, q_len, m, dout_row, 0, e, MASKED, VALUE, E)
        dv = tl.dot(p.to(g.dtype), g, dv)
        dp = tl.dot(values, tl.trans(g))
        ds = p * (dp - tl.load(delta + i, mask=i < q_len, other=0.0)[None, :])
        if CAPPED:
            ds = ds * (1.0 - t * t)
        dk = tl.dot(ds.to(x.dtype), x, dk)
    return dk, dv


@triton.jit
def _keys_backward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    begins,
    ends,
    q_len,
    k_len,
    reach,
    factor,
    cap,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    lse_head,
    dk_row,
    dk_head,
    dv_row,
    dv_head,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
):
    start = tl.program_id(0) * N
    head = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    j = start + n
    keys = _load(k, start, k_len, n, k_row, head * k_head, d, True, DIM, D)
    values = _load(v, start, k_len, n, v_row, head * v_head, e, True, VALUE, E)
    gk = tl.zeros([N, D], tl.float32)
    gv = tl.zeros([N, E], tl.float32)
    # queries that see some of these keys, and those that see all of them
    last = tl.minimum(start + N, k_len) - 1
    first = start // M * M if CAUSAL else 0
    clear = tl.cdiv(last, M) * M if CAUSAL else 0
    stop = q_len
    whole = q_len // M * M
    if PACKED:
        end = tl.load(ends + j, mask=j < k_len, other=0)
        stop = tl.minimum(stop, tl.max(end))
        # only a block of keys of one document has queries that see all of it
        whole = tl.minimum(whole, tl.min(tl.where(j < k_len, end, q_len)) // M * M)
    if WINDOW:
        stop = tl.minimum(stop, last + reach + 1)
        whole = tl.minimum(whole, tl.maximum(start + reach + 1, 0) // M * M)
    stop = tl.maximum(stop, first)
    clear = tl.minimum(clear, tl.cdiv(stop, M) * M)
    whole = tl.maximum(whole, clear)
    for shared in range(0, GROUP):
        h = head * GROUP + shared
        qh = q + h * q_head
        gh = dout + h * dout_head
        lh = lse + h * lse_head
        eh = delta + h * q_len
        if CAUSAL:
            gk, gv = _key_block(
                gk, gv, keys, values, qh, gh, lh, eh, j, begins, first, clear, q_len, k_len, reach,
                factor, cap, q_row, dout_row, True, CAUSAL, PACKED, WINDOW, CAPPED, M, D, E, DIM,
                VALUE,
            )  # fmt: skip
        gk, gv = _key_block(
            gk, gv, keys, values, qh, gh, lh, eh, j, begins, clear, whole, q_len, k_len, reach,
            factor, cap, q_row, dout_row, False, CAUSAL, PACKED, WINDOW, CAPPED, M, D, E, DIM,
            VALUE,
        )  # fmt: skip
        gk, gv = _key_block(
            gk, gv, keys, values, qh, gh, lh, eh, j, begins, whole, stop, q_len, k_len, reach,
            factor, cap, q_row, dout_row, True, CAUSAL, PACKED, WINDOW, CAPPED, M, D, E, DIM,
            VALUE,
        )  # fmt: skip
    _store(dk, gk * scale, start, k_len, n, dk_row, head * dk_head, d, DIM)
    _store(dv, gv, start, k_len, n, dv_row, head * dv_head, e, VALUE)


@triton.jit
def _query_block(  # type: ignore[no-untyped-def]
    dq,
    x,
    g,
    high,
    delta,
    k,
    v,
    i,
    low,
    start,
    stop,
    k_len,
    k_row,
    v_row,
    k_head,
    v_head,
    factor,
    cap,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Adds the keys [start, stop), in blocks of N."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    for first in range(start, stop, N):
        keys = _load(k, first, k_len, n, k_row, k_head, d, MASKED, DIM, D)
        s = tl.dot(x, tl.trans(keys)) * factor
        if CAPPED:
            t = _tanh(s)
            s = t * cap
        p = tl.exp2(s - high[:, None])
        if MASKED:
            j = first + n
            seen = (j[None, :] >= low[:, None]) & (j < k_len)[None, :]
            if CAUSAL:
                seen = seen & (j[None, :] <= i[:, None])
            p = tl.where(seen, p, 0.0)
        values = _load(v, first, k_len, n, v_row, v_head, e, MASKED, VALUE, E)
        dp = tl.dot(g, tl.trans(values))
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds = ds * (1.0 - t * t)
        dq = tl.dot(ds.to(keys.dtype), keys, dq)
    return dq


@triton.jit
def _queries_backward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    begins,
    q_len,
    k_len,
    reach,
    factor,
    cap,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    lse_head,
    dq_row,
    dq_head,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
):
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    i = start + m
    low = _low(i, begins, q_len, reach, PACKED, WINDOW)
    x = _load(q, start, q_len, m, q_row, head * q_head, d, True, DIM, D)
    g = _load(dout, start, q_len, m, dout_row, head * dout_head, e, True, VALUE, E)
    high = tl.load(lse + head * lse_head + i, mask=i < q_len, other=float("inf")) * LOG2_E
    high = tl.where(high == float("-inf"), float("inf"), high)
    own = tl.load(delta + head * q_len + i, mask=i < q_len, other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    last = tl.minimum(start + M, q_len) - 1
    stop = tl.minimum(last + 1, k_len) if CAUSAL else k_len
    least = tl.maximum(tl.min(tl.where(i < q_len, low, k_len)), 0) // N * N
    clear = tl.cdiv(tl.max(tl.where(i < q_len, low, 0)), N) * N
    whole = (tl.minimum(start + 1, k_len) if CAUSAL else k_len) // N * N
    clear = tl.minimum(tl.maximum(clear, least), stop)
    whole = tl.maximum(whole, clear)
    kh = head // GROUP * k_head
    vh = head // GROUP * v_head
    if PACKED or WINDOW:
        acc = _query_block(
            acc, x, g, high, own, k, v, i, low, least, clear, k_len, k_row, v_row, kh, vh, factor,
            cap, True, CAUSAL, CAPPED, N, D, E, DIM, VALUE,
        )  # fmt: skip
    acc = _query_block(
        acc, x, g, high, own, k, v, i, low, clear, whole, k_len, k_row, v_row, kh, vh, factor,
        cap, False, CAUSAL, CAPPED, N, D, E, DIM, VALUE,
    )  # fmt: skip
    acc = _query_block(
        acc, x, g, high, own, k, v, i, low, whole, stop, k_len, k_row, v_row, kh, vh, factor,
        cap, True, CAUSAL, CAPPED, N, D, E, DIM, VALUE,
    )  # fmt: skip
    _store(dq, acc * scale, start, q_len, m, dq_row, head * dq_head, d, DIM)
