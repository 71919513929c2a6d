"""The mask as a list of tiles: dense rectangles, causal squares, squares of several documents. Host
integers only.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .layout import Interval, Segment, ancestors_length, join
from .pinned import copied

Kind = Literal["full", "causal", "varlen"]


@dataclasses.dataclass(eq=False)
class Tile:
    """One kernel call: rows `q` of the queries against rows `k` of the keys, both in the order in
    which they lie in memory.

    full: every pair. causal: a square, key <= query. varlen: a square made of causal squares, with
    boundaries `cu_seqlens` (first 0, last the number of rows). `window`, where given, keeps the
    pairs with

        query - key <= window + len(q) - len(k)        (indices inside the tile)

    which is the left bound that attention kernels call bottom-right aligned. Every query of a tile
    sees at least one key of it.

    `first`: no tile before this one has its queries. `valid`: only these of its queries count, the
    others only fill a shape; they may lie beyond the rank's rows.
    """

    q: slice
    k: slice
    kind: Kind
    cu_seqlens: tuple[int, ...] | None = None
    window: int | None = None
    first: bool = False
    valid: slice | None = None
    _device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def q_len(self) -> int:
        return self.q.stop - self.q.start

    @property
    def k_len(self) -> int:
        return self.k.stop - self.k.start

    @property
    def rows(self) -> slice:
        """The queries that count."""
        if self.valid is None:
            return self.q
        return slice(self.q.start + self.valid.start, self.q.start + self.valid.stop)

    @property
    def max_seqlen(self) -> int:
        assert self.cu_seqlens is not None
        return max(b - a for a, b in itertools.pairwise(self.cu_seqlens))

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """int32 boundaries on the device. Copied once for all layers."""
        if device not in self._device:
            host = torch.tensor(self.cu_seqlens, dtype=torch.int32)
            self._device[device] = copied(host, device)
        return self._device[device]

    def mask(self) -> Tensor:
        """[len(q), len(k)] bool: what this tile computes. For tests and for the plain
        mathematics.
        """
        i, j = torch.arange(self.q_len).unsqueeze(1), torch.arange(self.k_len).unsqueeze(0)
        seen = torch.ones(self.q_len, self.k_len, dtype=torch.bool)
        if self.kind != "full":
            seen &= j <= i
        if self.cu_seqlens is not None:
            document = torch.bucketize(
                torch.arange(self.q_len), torch.tensor(self.cu_seqlens[1:]), right=True
            )
            seen &= document.unsqueeze(1) == document.unsqueeze(0)
        if self.window is not None:
            seen &= i - j <= self.window + self.q_len - self.k_len
        if self.valid is not None:
            seen &= (i >= self.valid.start) & (i < self.valid.stop)
        return seen


class Run(NamedTuple):
    """Rows [start, stop) of the row, which lie in memory from `offset` on."""

    offset: int
    start: int
    stop: int


def runs(intervals: Sequence[Interval]) -> tuple[Run, ...]:
    """Intervals laid end to end in memory."""
    out, offset = [], 0
    for start, stop in intervals:
        out.append(Run(offset, start, stop))
        offset += stop - start
    return tuple(out)


class Mask:
    """Who sees whom: the segments, cut further by chunked attention, with an optional sliding
    window.

    A query at position p of its document sees the keys of its segment and of the segment's
    ancestors at positions p - window + 1 ... p. Chunked attention (Llama 4) keeps the keys in the
    query's own chunk of `chunk` positions. In a block a query sees all of the block too.
    """

    def __init__(
        self, segments: Sequence[Segment], window: int | None = None, chunk: int | None = None
    ) -> None:
        first = ancestors_length(segments)
        if chunk is not None:
            segments, first = _cut(segments, first, chunk)
        self.window = window
        # Position of a token is its row index plus the shift of its segment.
        self._shift = [p - s.start for p, s in zip(first, segments, strict=True)]
        # Of each segment: (shift, start, stop) of its ancestors' rows, those that lie side by side
        # as one.
        self._ancestors: list[list[tuple[int, int, int]]] = []
        for s in segments:
            rows: list[tuple[int, int, int]] = []
            if s.parent >= 0:
                p = segments[s.parent]
                rows = [(self._shift[s.parent], p.start, p.stop), *self._ancestors[s.parent]]
                if len(rows) > 1 and rows[1][0] == rows[0][0] and rows[1][2] == rows[0][1]:
                    rows[:2] = [(rows[0][0], rows[1][1], rows[0][2])]
            self._ancestors.append(rows)
        self.segments = tuple(segments)
        self._order = [i for i, s in enumerate(segments) if s.stop > s.start]
        self._starts = [segments[i].start for i in self._order]

    def spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(segment, start, stop) of the segments cut to the rows [start, stop)."""
        out = []
        i = bisect.bisect_right(self._starts, start) - 1
        while i < len(self._order) and self._starts[i] < stop:
            s = self.segments[self._order[i]]
            out.append((self._order[i], max(s.start, start), min(s.stop, stop)))
            i += 1
        return out

    def before(self, segment: int, start: int) -> list[tuple[int, Interval]]:
        """(shift, rows) that the query at row `start` sees, those of its own segment first, without
        what begins at `start` itself; of a block the whole block. Rows may be empty.
        """
        own, shift = self.segments[segment], self._shift[segment]
        rows = [(shift, own.start, start), *self._ancestors[segment]]
        out = []
        for at, lo, hi in rows:
            if self.window is not None:
                lo = max(lo, start + shift - self.window + 1 - at)
            out.append((at, (lo, hi)))
        if own.block:
            out[0] = (shift, (own.start, own.stop))
        return out

    def needed(self, queries: Sequence[Interval]) -> tuple[Interval, ...]:
        """Rows that some query sees, besides the queries' own rows."""
        seen = [
            rows
            for a, b in queries
            for s, lo, _ in self.spans(a, b)
            for _, rows in self.before(s, lo)
        ]
        return subtract(join(seen), queries)

    def tiles(self, queries: Sequence[Run], keys: Sequence[Run], same: bool) -> tuple[Tile, ...]:
        """The mask between rows in memory. `same`: keys are the queries' own rows; else they are
        disjoint from them.

        With `same`, the first tile covers every query; where there are blocks, the first ones do.
        """
        spans = [
            (s, a, b, run.offset + a - run.start)
            for run in queries
            for s, a, b in self.spans(run.start, run.stop)
        ]
        out = self._diagonal(spans) if same else []
        starts = [run.start for run in keys]
        full: list[tuple[int, int, int, int]] = []
        for segment, a, b, at in spans:
            block = self.segments[segment].block
            for place, (shift, (lo, hi)) in enumerate(self.before(segment, a)):
                own = place == 0
                if same and own and (self.window is None or block):
                    continue  # inside the diagonal tile
                for run in keys[max(0, bisect.bisect_right(starts, lo) - 1) :]:
                    if run.start >= hi:
                        break
                    c, d = max(lo, run.start), min(hi, run.stop)
                    if c >= d:
                        continue
                    k0 = run.offset + c - run.start
                    # from the first query to the first key
                    distance = a + self._shift[segment] - c - shift
                    in_block = own and block
                    if self.window is None or in_block or distance + b - a - 1 < self.window:
                        full.append((at, at + b - a, k0, k0 + d - c))
                        continue
                    whole, tile = _in_window(self.window, at, b - a, k0, d - c, distance)
                    full += whole
                    out += tile
        out.extend(Tile(slice(a, b), slice(c, d), "full") for a, b, c, d in merge_rectangles(full))
        return tuple(out)

    def _diagonal(self, spans: list[tuple[int, int, int, int]]) -> list[Tile]:
        """Own rows against own rows of the same segment: of blocks full squares, of the stretches
        between them causal ones.
        """
        out: list[Tile] = []
        stretch: list[tuple[int, int, int, int]] = []
        for s, same in itertools.groupby(spans, key=lambda span: span[0]):
            rows = list(same)
            if not self.segments[s].block:
                stretch += rows
                continue
            _, a, b, last = rows[-1]
            square = slice(rows[0][3], last + b - a)
            out += [*self._causal(stretch), Tile(square, square, "full", first=True)]
            stretch = []
        return out + self._causal(stretch)

    def _causal(self, spans: list[tuple[int, int, int, int]]) -> list[Tile]:
        """Rows ascend in memory, so order in memory is causal order: spans of one segment are one
        square, unless a window measures the gap between them.
        """
        cuts: list[int] = []
        last = -1
        for s, _, _, at in spans:
            if s != last or self.window is not None:
                cuts.append(at)
            last = s
        if not spans:
            return []
        end = spans[-1][3] + spans[-1][2] - spans[-1][1]
        cuts.append(end)
        longest = max(b - a for a, b in itertools.pairwise(cuts))
        window = self.window - 1 if self.window is not None and self.window < longest else None
        start = cuts[0]
        rows = slice(start, end)
        if len(cuts) == 2:
            return [Tile(rows, rows, "causal", window=window, first=True)]
        lengths = tuple(c - start for c in cuts)
        return [Tile(rows, rows, "varlen", lengths, window, first=True)]


def _in_window(
    window: int, at: int, queries: int, k0: int, keys: int, distance: int
) -> tuple[list[tuple[int, int, int, int]], list[Tile]]:
    """What queries see of earlier keys through a window that some of the keys have left: a plain
    rectangle and a tile, each at most one.

    Args:
        at, k0: places of the first query and of the first key; `queries`, `keys`: how many.
        distance: from the first query back to the first key, in tokens.
    """
    # later queries see no key of this run
    n = min(queries, window - distance + keys - 1)
    if n <= 0:
        return [], []
    full = []
    if n > keys:
        # FlashAttention 2 cannot say that the first of more queries than keys see every key: its
        # right bound ends at the number of keys. Those queries are a plain rectangle; the others
        # are fewer than the keys.
        whole = max(0, window - distance)
        full.append((at, at + whole, k0, k0 + keys))
        at, n, distance = at + whole, n - whole, distance + whole
        if n == 0:
            return full, []
    left = window - 1 - distance + keys - n
    return full, [Tile(slice(at, at + n), slice(k0, k0 + keys), "full", window=left)]


def merge_rectangles(
    rectangles: Sequence[tuple[int, int, int, int]],
) -> list[tuple[int, int, int, int]]:
    """(q0, q1, k0, k1): those that touch side by side become one, first along the keys, then along
    the queries.
    """
    out: list[tuple[int, int, int, int]] = []
    for a, b, c, d in sorted(rectangles):
        if out and out[-1][:2] == (a, b) and out[-1][3] == c:
            out[-1] = (a, b, out[-1][2], d)
        else:
            out.append((a, b, c, d))
    rows: list[tuple[int, int, int, int]] = []
    for a, b, c, d in sorted(out, key=lambda r: (r[2], r[3], r[0])):
        if rows and rows[-1][2:] == (c, d) and rows[-1][1] == a:
            rows[-1] = (rows[-1][0], b, c, d)
        else:
            rows.append((a, b, c, d))
    return rows


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> tuple[Interval, ...]:
    """Sorted disjoint intervals `a` without the rows of `b`."""
    out = []
    b = join(b)
    for start, stop in a:
        for lo, hi in b:
            if hi <= start:
                continue
            if lo >= stop:
                break
            if lo > start:
                out.append((start, lo))
            start = max(start, hi)
        if start < stop:
            out.append((start, stop))
    return tuple(out)


def intersect(a: Sequence[Interval], b: Sequence[Interval]) -> tuple[Interval, ...]:
    """Rows in both of two sorted disjoint lists."""
    out, j = [], 0
    for start, stop in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        i = j
        while i < len(b) and b[i][0] < stop:
            out.append((max(start, b[i][0]), min(stop, b[i][1])))
            i += 1
    return tuple(out)


def _cut(
    segments: Sequence[Segment], first: list[int], chunk: int
) -> tuple[list[Segment], list[int]]:
    """Segments cut where the position is a multiple of `chunk`. A branch that begins inside a chunk
    keeps the parent's last span.
    """
    out: list[Segment] = []
    position: list[int] = []
    last: list[int] = []  # the last span of each segment
    if any(s.block for s in segments):
        raise ValueError("Chunked attention has no blocks of tokens that see each other.")
    for s, p in zip(segments, first, strict=True):
        parent = last[s.parent] if s.parent >= 0 and p % chunk else -1
        start = s.start
        while True:
            stop = min(s.stop, start + chunk - p % chunk)
            out.append(Segment(start, stop, parent))
            position.append(p)
            p, start, parent = p + stop - start, stop, -1
            if start >= s.stop:
                break
        last.append(len(out) - 1)
    return out, position
