"""What the kernels of `chunk_kernels` have in common: products, loads of a chunk's tokens, decays.

A decay is one number of a token and head, with sums of logarithms [C] in a chunk, or, with
CHANNELS, one of each channel of the keys, with sums [C, Dk].
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

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
def product(x, y, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if PRECISION == "tf32":
        x, y = _rounded(x), _rounded(y)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def exact(x, y):  # type: ignore[no-untyped-def]
    """A product of nearly float32's precision."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def tokens(row_of, length_of, chunk, i):  # type: ignore[no-untyped-def]
    """[B] tokens i of a chunk -> their local rows, and which of them are there."""
    return tl.load(row_of + chunk).to(tl.int64) + i, i < tl.load(length_of + chunk)


@triton.jit
def rows(x, row, x_row, x_head, head, column, here, size):  # type: ignore[no-untyped-def]
    """[C, B] some columns of a head's vectors of these tokens, in fp32; 0 where there is none."""
    place = row[:, None] * x_row + head * x_head + column[None, :]
    inside = here[:, None] & (column < size)[None, :]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rates(beta, row, beta_row, head, here):  # type: ignore[no-untyped-def]
    """[C] in fp32; 0 where there is no token."""
    return tl.load(beta + row * beta_row + head, mask=here, other=0.0).to(tl.float32)


@triton.jit
def of_chunk(x, at, i, column, size, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """[B, D] some columns of what is stored of tokens i of a chunk; 0 where there is none."""
    place = (at * C + i[:, None]) * size + column[None, :]
    return tl.load(x + place, mask=(column < size)[None, :], other=0.0)


@triton.jit
def of_token(x, at, i, column, size, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """[D] the same of one token."""
    return tl.load(x + (at * C + i) * size + column, mask=column < size, other=0.0)


@triton.jit
def square(at, i, j, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """[B, B] places of tokens i and j in what is stored of each pair of a chunk's tokens."""
    return (at * C + i[:, None]) * C + j[None, :]


@triton.jit
def decay(sums, size: tl.constexpr, apart: tl.constexpr):  # type: ignore[no-untyped-def]
    """[C] -> [C, C]: the decay from token j to token i; 0 unless i is `apart` after j or later."""
    i = tl.arange(0, size)
    seen = i[:, None] - i[None, :] >= apart
    return tl.where(seen, tl.exp(tl.where(seen, sums[:, None] - sums[None, :], 0.0)), 0.0)


@triton.jit
def grown(x, sums, at, i, dk, DK, C: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[C, BK] vectors of a chunk's tokens, decayed from its beginning."""
    if CHANNELS:
        by = tl.exp(of_chunk(sums, at, i, dk, DK, C))
    else:
        by = tl.exp(tl.load(sums + at * C + i))[:, None]
    return x * by


@triton.jit
def left(x, sums, at, i, dk, DK, C: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[C, BK] vectors of a chunk's tokens, decayed to its end, and the decay of the whole chunk,
    [BK, 1] or one number.
    """
    if CHANNELS:
        last = of_token(sums, at, C - 1, dk, DK, C)
        by, whole = tl.exp(last[None, :] - of_chunk(sums, at, i, dk, DK, C)), last[:, None]
    else:
        last = tl.load(sums + at * C + C - 1)
        by, whole = tl.exp(last - tl.load(sums + at * C + i))[:, None], last
    return x * by, tl.exp(whole)


@triton.jit
def scores(  # type: ignore[no-untyped-def]
    queries, keys, sums, p, at, i, C: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr
):
    """[C, C] of a chunk's queries and keys, decayed; those of CHANNELS are stored in p."""
    if CHANNELS:
        found = tl.load(p + square(at, i, i, C))
    else:
        total = tl.load(sums + at * C + i)
        found = product(queries, tl.trans(keys), PRECISION) * decay(total, C, 0)
    return found


@triton.jit
def before_inversion(  # type: ignore[no-untyped-def]
    given, solved, t, room, at, i, C: tl.constexpr, IN_BLOCKS: tl.constexpr
):
    """[C, C] gradients of a strictly lower triangular matrix L, by those of the inverse of I + L.

    Args:
        given: [C, C], of the inverse.
        solved: the inverse, [C, C], which is stored in t.
        room: with IN_BLOCKS, what is written over, of the size of t: products are of 16 tokens at
            once, read from memory. Where tensor cores multiply from registers, whole factors of
            three products of TF32 need more of them than there are.
    """
    if IN_BLOCKS:
        pairs = square(at, i, i, C)
        # Written over what other warps may not have read yet, and read by others than wrote it.
        tl.debug_barrier()
        tl.store(room + pairs, given)
        tl.debug_barrier()
        half = tl.zeros([C, C], dtype=tl.float32)
        for begin in tl.range(0, C, 16, num_stages=1):
            some = square(at, begin + tl.arange(0, 16), i, C)
            half += exact(tl.trans(tl.load(t + some)), tl.load(room + some))
        tl.debug_barrier()
        tl.store(room + pairs, half)
        tl.debug_barrier()
        lower = tl.zeros([C, C], dtype=tl.float32)
        for begin in tl.range(0, C, 16, num_stages=1):
            some = square(at, i, begin + tl.arange(0, 16), C)
            lower -= exact(tl.load(room + some), tl.trans(tl.load(t + some)))
    else:
        lower = exact(tl.trans(solved), given)
        lower = -exact(lower, tl.trans(solved))
    return tl.where(i[:, None] > i[None, :], lower, 0.0)
