"""Which tokens of a row each rank holds: integer arithmetic, no tensors' data, no process group."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

Interval = tuple[int, int]
"""Rows [start, stop) of the row, in natural order."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a row that attend causally to each other and, where there is a
    parent, to all of the parent.

    `parent` indexes the list of segments, -1 for none. Positions in a segment with a parent go on
    from the parent's end, which is what a sliding window measures. A parent's own parent is seen
    too. In a `block` (an image of Gemma 3) every token sees every other, whatever the window.
    """

    start: int
    stop: int
    parent: int = -1
    block: bool = False


def with_blocks(segments: Sequence[Segment], blocks: Sequence[Interval]) -> tuple[Segment, ...]:
    """Segments cut at blocks of tokens that see each other: a chain of segments, each the parent of
    the next, in place of each.

    Args:
        segments: of a row.
        blocks: rows [start, stop), ascending, disjoint, each inside one segment.
    Raises:
        ValueError: a block that no segment holds.
    """
    out: list[Segment] = []
    last: list[int] = []  # the last piece of each segment
    waiting = list(reversed(blocks))
    for s in segments:
        parent = last[s.parent] if s.parent >= 0 else -1
        at = s.start
        while waiting and waiting[-1][0] < s.stop:
            start, stop = waiting.pop()
            if start < at or stop > s.stop:
                raise ValueError(
                    f"The tokens {start} to {stop} see each other, and are in no one document."
                )
            if start > at:
                out.append(Segment(at, start, parent))
                parent = len(out) - 1
            out.append(Segment(start, stop, parent, block=True))
            parent, at = len(out) - 1, stop
        if at < s.stop or s.start == s.stop:
            out.append(Segment(at, s.stop, parent))
            parent = len(out) - 1
        last.append(parent)
    if waiting:
        raise ValueError(f"The tokens {waiting[-1]} see each other, and are in no document.")
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Layout:
    """For each rank the intervals of the row that it holds, ascending, disjoint, and maximal. Every
    rank holds length / n tokens.
    """

    length: int
    intervals: tuple[tuple[Interval, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.intervals)

    @property
    def local_length(self) -> int:
        return self.length // self.ranks

    def split(self, parts: int) -> Layout:
        """Each rank's tokens dealt to `parts` ranks in turn: rank r becomes ranks r * parts ... r *
        parts + parts - 1.
        """
        per_rank = self.local_length // parts
        if per_rank * parts != self.local_length:
            raise ValueError(f"{self.local_length} tokens do not divide over {parts} ranks.")
        out: list[tuple[Interval, ...]] = []
        for intervals in self.intervals:
            queue = list(reversed(intervals))
            for _ in range(parts):
                want, mine = per_rank, []
                while want:
                    start, stop = queue.pop()
                    take = min(want, stop - start)
                    mine.append((start, start + take))
                    want -= take
                    if start + take < stop:
                        queue.append((start + take, stop))
                out.append(tuple(mine))
        return Layout(self.length, tuple(out))


def join(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Sorted, with empty ones dropped and touching or overlapping ones united."""
    out: list[Interval] = []
    for start, stop in sorted(i for i in intervals if i[1] > i[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def contiguous(length: int, ranks: int) -> Layout:
    """Rank r holds the r-th of n equal parts."""
    return _deal(length, range(ranks), ranks)


def zigzag(length: int, ranks: int) -> Layout:
    """2n equal chunks, rank r holds chunks r and 2n - 1 - r: causal attention to one document is
    the same work on every rank.
    """
    return _deal(length, [min(c, 2 * ranks - 1 - c) for c in range(2 * ranks)], ranks)


def balanced(
    length: int, ranks: int, segments: Sequence[Segment], smallest_chunk: int = 1
) -> Layout:
    """Chunks dealt to ranks by their attention work: longest processing time first, the same number
    of chunks for every rank.

    2 to 8 chunks a rank: as many as divide the local length with chunks no shorter than
    `smallest_chunk`. Graham, Bounds on multiprocessing timing anomalies, 1969.
    """
    local = length // ranks
    per_rank = next(
        (m for m in (8, 7, 6, 5, 4, 3, 2) if local % m == 0 and local // m >= smallest_chunk), 1
    )
    chunks, size = per_rank * ranks, local // per_rank
    if size == 0:
        return contiguous(length, ranks)
    work = chunk_work(length, chunks, segments)
    owner = [0] * chunks
    heap = [(0, r) for r in range(ranks)]
    held = [0] * ranks
    for c in sorted(range(chunks), key=lambda c: (-work[c], c)):
        load, r = heapq.heappop(heap)
        owner[c] = r
        held[r] += 1
        if held[r] < per_rank:
            heapq.heappush(heap, (load + work[c], r))
    return _deal(length, owner, ranks)


def chunk_work(length: int, chunks: int, segments: Sequence[Segment]) -> list[int]:
    """(query, key) pairs of the queries in each of `chunks` equal chunks."""
    size = length // chunks
    work = [0] * chunks
    seen = ancestors_length(segments)
    for s, before in zip(segments, seen, strict=True):
        for c in range(s.start // size, -(-s.stop // size)):
            a, b = max(s.start, c * size) - s.start, min(s.stop, (c + 1) * size) - s.start
            if b > a and s.block:
                work[c] += (before + s.stop - s.start) * (b - a)
            elif b > a:
                work[c] += b * (b + 1) // 2 - a * (a + 1) // 2 + before * (b - a)
    return work


def ancestors_length(segments: Sequence[Segment]) -> list[int]:
    """Tokens in each segment's parent, the parent's parent, and so on: the position of the
    segment's first token.
    """
    seen: list[int] = []
    for s in segments:
        seen.append(
            seen[s.parent] + segments[s.parent].stop - segments[s.parent].start
            if s.parent >= 0
            else 0
        )
    return seen


def _deal(length: int, owner: Sequence[int], ranks: int) -> Layout:
    size = length // len(owner)
    if size * len(owner) != length:
        raise ValueError(
            f"{length} tokens do not divide into {len(owner)} equal chunks. Pad the row to"
            " sp.alignment(ctx) first."
        )
    held: list[list[Interval]] = [[] for _ in range(ranks)]
    for c, r in enumerate(owner):
        held[r].append((c * size, (c + 1) * size))
    return Layout(length, tuple(join(h) for h in held))
