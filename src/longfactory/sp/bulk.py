"""Large tiles cut to few shapes, for a kernel that is fast but builds a plan for each shape.

Packed rows have documents of any length, so their tiles have any shape. A large causal square is
made a little longer: the additional queries belong to other documents, and are dropped. Where the
rank's rows end before it does, the square reaches beyond them, and `kernels` pads the tensors with
zeros. A large rectangle gets additional queries among the rank's rows, and the keys that are left
over at its beginning become a small rectangle for another kernel. In the backward pass the
additional queries have lse = +inf: their probabilities are zero, so they add nothing to any
gradient.

Additional work: half a unit of queries a tile on average, 3 % of a square and 6 % of a rectangle.

Documents shorter than `SMALLEST` stay together in one call of a kernel for documents: a call of
their own would take the host as long as it takes the GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from .layout import OWN_CALL
from .tiles import Tile

SMALLEST = OWN_CALL
"""2,048 tokens: shorter tiles are left alone. One cuDNN call for each document was 1.1 to 1.6 times
as fast as documents in one FlashAttention 2 call where most of them were this long
(benchmarks/results/kernels.md)."""


LONG = 16384
"""From this length on, a square that ends with the row is worth a shape of its own where none of
the few shapes fits: building it takes as long as its attention saves in a few layers."""


def bulk_tiles(tiles: Sequence[Tile], rows: int) -> tuple[Tile, ...]:
    """The same pairs of queries and keys. `rows`: queries that this rank holds."""
    out: list[Tile] = []
    for tile in tiles:
        if tile.window is not None or (tile.kind == "full" and tile.first):
            out.append(tile)
        elif tile.kind == "full":
            out.extend(_rectangle(tile, rows))
        else:
            out.extend(_squares(tile, rows))
    return tuple(out)


def unit(length: int, shapes: int) -> int:
    """Lengths are made multiples of this power of two: so many shapes for each doubling of the
    length.
    """
    return 2 ** max(0, (length // shapes).bit_length() - 1)


def _longer(length: int, limit: int, unit: int) -> int | None:
    """The length rounded up to a multiple of `unit`, if long at least to one of 128, or the length
    itself where that is a good one already. None where no such length is within `limit`.
    """
    if length % 128 == 0:
        return length
    for step in (unit, 128) if length >= LONG else (unit,):
        rounded = -(-length // step) * step
        if rounded <= limit:
            return rounded
    return None


def _squares(tile: Tile, rows: int) -> list[Tile]:
    """Long documents become squares of their own, runs of short ones stay together."""
    out, run = [], [0]
    for a, b in itertools.pairwise(tile.cu_seqlens or (0, tile.q_len)):
        if b - a < SMALLEST:
            run.append(b)
            continue
        out.extend(_run(tile, run))
        run = [b]
        start = tile.q.start + a
        step = unit(b - a, 16)
        # the last document of the rank may have no rows after it: then the tile ends beyond them
        length = _longer(b - a, rows - start, step) or -(-(b - a) // step) * step
        square = slice(start, start + length)
        out.append(
            Tile(
                square,
                square,
                "causal",
                first=True,
                valid=None if length == b - a else slice(0, b - a),
            )
        )
    out.extend(_run(tile, run))
    return out


def _run(tile: Tile, cuts: list[int]) -> list[Tile]:
    if len(cuts) == 1:
        return []
    square = slice(tile.q.start + cuts[0], tile.q.start + cuts[-1])
    if len(cuts) == 2:
        return [Tile(square, square, "causal", first=True)]
    return [Tile(square, square, "varlen", tuple(c - cuts[0] for c in cuts), first=True)]


def _rectangle(tile: Tile, rows: int) -> list[Tile]:
    if tile.q_len < SMALLEST or tile.k_len < SMALLEST:
        return [tile]
    # Rectangles have two sides that vary, so each gets fewer values.
    spare = tile.k_len % unit(tile.k_len, 8) if tile.k_len % 128 else 0
    if spare == tile.k_len:
        return [tile]
    length = _longer(tile.q_len, rows, unit(tile.q_len, 8)) or tile.q_len
    start = min(tile.q.start, rows - length)
    valid = slice(tile.q.start - start, tile.q.stop - start)
    whole = length == tile.q_len
    out = [
        Tile(
            slice(start, start + length),
            slice(tile.k.start + spare, tile.k.stop),
            "full",
            valid=None if whole else valid,
        )
    ]
    if spare:
        out.append(
            dataclasses.replace(tile, k=slice(tile.k.start, tile.k.start + spare), _device={})
        )
    return out
