"""The plan of a row: which tokens this rank holds and which tiles it computes. Made once, on the
host, and reused by every layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .bulk import bulk_tiles
from .context import Axes, SequenceParallel, alignment
from .layout import Interval, Layout, Segment, balanced, contiguous, zigzag
from .pinned import copied
from .schedules.choose import Choice, choose
from .tiles import Mask, Run, Tile, intersect, runs

FETCH_BELOW = 0.5
"""A ring gives way to a fetch of needed rows where the busiest rank needs less than this share of
what the ring would bring it.
"""

HALO = -1
"""In place of a ring position: the rows that a rank fetches of all others, in natural order."""


class RowPlan:
    """See `plan`. `index` is [T/n] int64 on the host: the global positions of this rank's tokens,
    in local order, ascending.
    """

    def __init__(
        self, length: int, segments: tuple[Segment, ...], ctx: SequenceParallel, choice: Choice
    ) -> None:
        self.length = length
        self.segments = segments
        self.ctx = ctx
        self.choice = choice
        ring = ctx.size // choice.ulysses
        if choice.layout == "balanced":
            smallest = 512 if ctx.device_type == "cuda" else 1
            self.ring_layout = balanced(length, ring, segments, smallest)
        else:
            self.ring_layout = zigzag(length, ring) if ring > 1 else contiguous(length, 1)
        self.layout: Layout = self.ring_layout.split(choice.ulysses)
        self.index = _positions(self.layout.intervals[ctx.rank])
        self._masks: dict[tuple[int | None, int | None], MaskPlan] = {}

    @property
    def local_length(self) -> int:
        return self.layout.local_length

    @property
    def axes(self) -> Axes:
        return self.ctx.axes.get(self.choice.ulysses, Axes(None, None))

    @property
    def ring_rank(self) -> int:
        return self.ctx.rank // self.choice.ulysses

    def mask(self, window: int | None = None, chunk: int | None = None) -> MaskPlan:
        """Tiles for layers with this sliding window or attention chunk. Made at the first call."""
        if window is not None and window >= self.length:
            window = None  # wider than the row
        if chunk is not None and chunk >= self.length:
            chunk = None
        key = (window, chunk)
        if key not in self._masks:
            self._masks[key] = MaskPlan(
                Mask(self.segments, window, chunk), self.ring_layout, self.ring_rank
            )
        return self._masks[key]

    @functools.cached_property
    def _natural_runs(self) -> list[tuple[int, int, int]]:
        """(offset in the ranks' shards laid end to end, start, stop), in natural order."""
        out, offset = [], 0
        for intervals in self.layout.intervals:
            for start, stop in intervals:
                out.append((offset, start, stop))
                offset += stop - start
        return sorted(out, key=lambda r: r[1])


class MaskPlan:
    """The tiles of one mask for the ring position `rank` of `layout`, by the ring position that
    holds the keys.
    """

    def __init__(self, mask: Mask, layout: Layout, rank: int) -> None:
        self.mask = mask
        self.layout = layout
        self.rank = rank
        self.queries = runs(layout.intervals[rank])
        self._tiles: dict[tuple[int, bool], tuple[Tile, ...]] = {}
        self._once: dict[tuple[tuple[int, ...], bool], bool] = {}
        self._device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tiles(self, source: int, bulk: bool = False) -> tuple[Tile, ...]:
        """This rank's queries against the keys of ring position `source`, keys in that rank's local
        order. `bulk`: see bulk.py.
        """
        if (source, bulk) not in self._tiles:
            if source == HALO:
                tiles = self.mask.tiles(self.queries, runs(self.halo.fetched), same=False)
            else:
                tiles = self.mask.tiles(
                    self.queries, runs(self.layout.intervals[source]), source == self.rank
                )
            self._tiles[source, bulk] = (
                bulk_tiles(tiles, self.layout.local_length) if bulk else tiles
            )
        return self._tiles[source, bulk]

    def merges_once(self, sources: tuple[int, ...], bulk: bool = False) -> bool:
        """No query is in more than two tiles: a first one, and another."""
        key = (sources, bulk)
        if key not in self._once:
            tiles = [t for s in sources for t in self.tiles(s, bulk)]
            events = sorted([(t.rows.start, 1) for t in tiles] + [(t.rows.stop, -1) for t in tiles])
            self._once[key] = max(itertools.accumulate(change for _, change in events)) <= 2
        return self._once[key]

    def writes_once(self, source: int, bulk: bool = False) -> bool:
        """Each row is in one tile with the keys of `source`, as a query and as a key: gradients of
        keys are written, not added.
        """
        return all(tile.first for tile in self.tiles(source, bulk))

    @functools.cached_property
    def ring_order(self) -> tuple[int, ...]:
        """The ring position whose keys are here, step by step."""
        return tuple((self.rank - step) % self.layout.ranks for step in range(self.last_step + 1))

    @functools.cached_property
    def last_step(self) -> int:
        """The last ring step at which any rank has work: after it no keys need to travel. The same
        on every rank.
        """
        n, last = self.layout.ranks, 0
        for r, queries in enumerate(self.layout.intervals):
            needed = self.mask.needed(queries)
            last = max(
                [
                    last,
                    *(
                        s
                        for s in range(1, n)
                        if intersect(needed, self.layout.intervals[(r - s) % n])
                    ),
                ]
            )
        return last

    @functools.cached_property
    def fetch_is_smaller(self) -> bool:
        """Whether fetching what is needed moves much less than passing everything round the ring.
        The same on every rank.
        """
        most = max(
            sum(b - a for a, b in self.mask.needed(queries)) for queries in self.layout.intervals
        )
        return most <= FETCH_BELOW * self.last_step * self.layout.local_length

    @functools.cached_property
    def halo(self) -> Halo:
        return Halo.make(self.mask, self.layout, self.rank)

    def halo_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows to send, order of the received rows) on the device. Copied once for all layers."""
        if device not in self._device:
            self._device[device] = (
                copied(self.halo.send_index, device),
                copied(self.halo.order, device),
            )
        return self._device[device]


@dataclasses.dataclass(frozen=True)
class Halo:
    """Which rows each ring position sends to each other one, when only needed rows travel."""

    fetched: tuple[Interval, ...]
    """Rows that this rank needs of others, in natural order."""
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    send_index: Tensor
    """Local rows, destination after destination."""
    order: Tensor
    """order[i]: where the i-th fetched row lies in the received buffer, which is sorted by source.
    """
    anyone: bool
    """Whether any rank of the ring fetches anything."""

    @classmethod
    def make(cls, mask: Mask, layout: Layout, rank: int) -> Halo:
        needed = [mask.needed(q) for q in layout.intervals]
        mine = runs(layout.intervals[rank])
        sends = [
            _local_rows(mine, intersect(needed[d], layout.intervals[rank]))
            for d in range(layout.ranks)
        ]
        received = [runs(intersect(needed[rank], intervals)) for intervals in layout.intervals]
        counts = [sum(r.stop - r.start for r in rows) for rows in received]
        begin = itertools.accumulate(counts, initial=0)
        arrived = sorted(
            (r.start, at + r.offset, r.stop - r.start)
            for at, rows in zip(begin, received, strict=False)
            for r in rows
        )
        return cls(
            fetched=needed[rank],
            send_counts=tuple(len(s) for s in sends),
            receive_counts=tuple(counts),
            send_index=torch.cat(sends),
            order=_positions([(at, at + count) for _, at, count in arrived]),
            anyone=any(needed),
        )


def plan(length: int, segments: Sequence[Segment] | None, ctx: SequenceParallel) -> RowPlan:
    """Plans how a row's tokens and attention are sharded over the sequence-parallel group. Runs on
    the host, without communication.

    Args:
        length: T, the number of tokens of the row. Must be a multiple of `alignment(ctx)`: pad the
            row beforehand, and make the padding a separate document.
        segments: the documents, in order and without gaps from 0 to T. None: one document. Empty
            documents are allowed.
        ctx: the process groups.

    Raises:
        ValueError: a length that is not aligned, or segments that overlap, leave gaps, or name a
            parent that comes after them.
    """
    segments = tuple(segments) if segments is not None else (Segment(0, length),)
    if length < 1 or length % (2 * ctx.size if ctx.size > 1 else 1):
        raise ValueError(
            f"A row of {length} tokens over {ctx.size} ranks. Pad it to a multiple of"
            f" sp.alignment(ctx) = {alignment(ctx)}."
        )
    end = 0
    for i, s in enumerate(segments):
        if s.start != end or s.stop < s.start:
            raise ValueError(
                f"Segment {i} is [{s.start}, {s.stop}), but the one before it ends at {end}."
                " Segments cover the row in order."
            )
        if not -1 <= s.parent < i:
            raise ValueError(
                f"Segment {i} names segment {s.parent} as its parent; a parent comes before its"
                " branches."
            )
        end = s.stop
    if end != length:
        raise ValueError(
            f"Segments end at {end}, the row at {length}. Make the padding a separate segment."
        )
    return RowPlan(length, segments, ctx, choose(ctx, length, segments))


def _positions(intervals: Sequence[Interval]) -> Tensor:
    return (
        torch.cat([torch.arange(a, b) for a, b in intervals])
        if intervals
        else torch.zeros(0, dtype=torch.int64)
    )


def _local_rows(mine: Sequence[Run], rows: Sequence[Interval]) -> Tensor:
    """Memory rows of the given rows of the row, all of which lie in `mine`."""
    out = []
    for run in mine:
        for a, b in intersect(rows, [(run.start, run.stop)]):
            out.append(torch.arange(run.offset + a - run.start, run.offset + b - run.start))
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.int64)
