"""Which tokens of a row each rank holds: integer arithmetic, no tensors' data, no process group."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
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
    """Of several layouts the one whose busiest rank has least to do (`cost`): chunks dealt by their
    work, documents dealt whole, with or without a cut, or in few parts, zigzag.

    Args:
        smallest_chunk: dealt chunks are no shorter than this.
    """
    options = [dealt(length, ranks, segments, smallest_chunk)]
    if len(families(segments)) > 1:
        options += [
            whole(length, ranks, segments, share) for share in (math.inf, 1.5, 1.0, 0.7, 0.5)
        ]
        uncut = (filled(length, ranks, segments, last) for last in (16, 24, 32, 48))
        options += [layout for layout in uncut if layout is not None]
        if length % (2 * ranks) == 0:
            options.append(zigzag(length, ranks))
    return min(options, key=lambda layout: max(cost(layout, segments)))


def dealt(length: int, ranks: int, segments: Sequence[Segment], smallest_chunk: int = 1) -> Layout:
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


def whole(
    length: int, ranks: int, segments: Sequence[Segment], largest: float = math.inf
) -> Layout:
    """Documents dealt to ranks as wholes, those of most work first, each to the rank that has least
    to do among those with room for it. What is left over at the end is cut.

    Args:
        largest: a document of more work than this share of a rank's is cut beforehand, into parts
            of equal work.
    """
    work = _work(segments)
    most = largest * sum(work) / ranks
    parts: list[tuple[float, Interval]] = []
    for family, (start, stop) in families(segments):
        total = sum(work[i] for i in family)
        count = max(1, math.ceil(total / most)) if most else 1
        # causal: the first x of a document have x squared of its work
        edges = [start + round((stop - start) * math.sqrt(i / count)) for i in range(count + 1)]
        parts += [(total / count, (a, b)) for a, b in itertools.pairwise(edges)]
    room = [length // ranks] * ranks
    load = [0.0] * ranks
    held: list[list[Interval]] = [[] for _ in range(ranks)]
    for todo, (start, stop) in sorted(parts, key=lambda part: (-part[0], part[1])):
        each = todo / max(1, stop - start)
        while start < stop:
            fitting = [r for r in range(ranks) if room[r] >= stop - start]
            r = min(fitting or [r for r in range(ranks) if room[r]], key=lambda r: (load[r], r))
            end = min(stop, start + room[r])
            held[r].append((start, end))
            room[r] -= end - start
            load[r] += each * (end - start)
            start = end
    return Layout(length, tuple(join(h) for h in held))


def filled(length: int, ranks: int, segments: Sequence[Segment], last: int) -> Layout | None:
    """Documents dealt to ranks as wholes, and none is cut: nothing travels. None where that does
    not come out.

    Args:
        last: of so many shortest documents each rank gets some whose tokens add up to the room that
            it has left. The others are dealt before, those of most work first, as in `whole`.
    """
    work = _work(segments)
    documents = [(sum(work[i] for i in family), rows) for family, rows in families(segments)]
    documents.sort(key=lambda d: (d[1][1] - d[1][0], d[1]))
    rest = [rows for _, rows in documents[:last]]
    room, load = [length // ranks] * ranks, [0] * ranks
    held: list[list[Interval]] = [[] for _ in range(ranks)]
    for todo, (start, stop) in sorted(documents[last:], key=lambda d: (-d[0], d[1])):
        fitting = [r for r in range(ranks) if room[r] >= stop - start]
        if not fitting:
            return None
        r = min(fitting, key=lambda r: (load[r], r))
        held[r].append((start, stop))
        room[r] -= stop - start
        load[r] += todo
    # the busiest ranks choose first, and choose long ones, of which few are needed
    for r in sorted(range(ranks), key=lambda r: (-load[r], r)):
        chosen = _adding_up_to(room[r], [stop - start for start, stop in rest])
        if chosen is None:
            return None
        held[r] += [rest[i] for i in chosen]
        rest = [rows for i, rows in enumerate(rest) if i not in chosen]
    return Layout(length, tuple(join(h) for h in held))


def _adding_up_to(total: int, numbers: Sequence[int]) -> set[int] | None:
    """Indices of numbers whose sum is `total`, the last ones first; None if there are none."""
    # reached[i]: bit s is set where some of the first i numbers have the sum s
    reached, kept = [1], (1 << total + 1) - 1
    for number in numbers:
        reached.append((reached[-1] | reached[-1] << number) & kept)
    if not reached[-1] >> total & 1:
        return None
    chosen: set[int] = set()
    for i in reversed(range(len(numbers))):
        if total >= numbers[i] and reached[i] >> total - numbers[i] & 1:
            chosen.add(i)
            total -= numbers[i]
    return chosen


def _work(segments: Sequence[Segment]) -> list[int]:
    """(query, key) pairs of each segment."""
    seen = ancestors_length(segments)
    return [_pairs(s, before, s.start, s.stop) for s, before in zip(segments, seen, strict=True)]


def families(segments: Sequence[Segment]) -> list[tuple[list[int], Interval]]:
    """Segments that see each other and follow each other in the row: their indices, and the rows
    [start, stop) of all. Empty ones belong to none.
    """
    out: list[tuple[list[int], Interval]] = []
    for i, s in enumerate(segments):
        if s.parent >= 0 and out and s.parent >= out[-1][0][0]:
            members, (start, _) = out[-1]
            out[-1] = ([*members, i], (start, s.stop))
        elif s.stop > s.start:
            out.append(([i], (s.start, s.stop)))
    return out


OWN_CALL = 2048
"""Documents, or parts of one, from so many tokens on are a tile of their own where a kernel wants
that (`bulk`); runs of shorter ones are a tile together."""
TILE = 3_500_000
"""What a tile takes beside its pairs of queries and keys, in pairs: launches, tails of kernels,
sums. These three were fitted to the times of 49 layouts of packed rows over 2, 4 and 8 ranks, of 28
query heads on an H200 (benchmarks/results/many_gpus_packed_2xH200.md)."""
SIDE = 1100
"""What a rectangle takes beside that, for each row of its longer side."""
FETCH = 15_000_000
"""What fetching rows takes on each rank, however few they are: messages to wait for, sums in
float32 of what comes back."""


def cost(layout: Layout, segments: Sequence[Segment]) -> list[int]:
    """What each rank has to do: pairs of queries and keys, and what tiles, sides of the rectangles
    that the layout cuts off documents, and a fetch take beside them.
    """
    seen = ancestors_length(segments)
    starts = [s.start for s in segments]
    out = []
    cut = False
    for intervals in layout.intervals:
        total, in_run = 0, False
        for start, stop in intervals:
            i = bisect.bisect_right(starts, start) - 1
            while i < len(segments) and segments[i].start < stop:
                s = segments[i]
                a, b = max(s.start, start), min(s.stop, stop)
                if b > a:
                    total += _pairs(s, seen[i], a, b)
                    short = b - a < OWN_CALL
                    total += TILE * (not (short and in_run))
                    in_run = short
                    if a > s.start:
                        total += TILE + SIDE * max(b - a, a - s.start)
                        cut = True
                i += 1
        out.append(total)
    return [total + FETCH * cut for total in out]


def _pairs(s: Segment, before: int, start: int, stop: int) -> int:
    """(query, key) pairs of the queries [start, stop) of a segment that sees `before` tokens of its
    ancestors.
    """
    if s.block:
        return (before + s.stop - s.start) * (stop - start)
    a, b = start - s.start, stop - s.start
    return b * (b + 1) // 2 - a * (a + 1) // 2 + before * (b - a)


def chunk_work(length: int, chunks: int, segments: Sequence[Segment]) -> list[int]:
    """(query, key) pairs of the queries in each of `chunks` equal chunks."""
    size = length // chunks
    work = [0] * chunks
    seen = ancestors_length(segments)
    for s, before in zip(segments, seen, strict=True):
        for c in range(s.start // size, -(-s.stop // size)):
            a, b = max(s.start, c * size), min(s.stop, (c + 1) * size)
            if b > a:
                work[c] += _pairs(s, before, a, b)
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
