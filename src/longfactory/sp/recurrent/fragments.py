"""Which stretches of documents a rank holds, and from which stretch each one's state comes. Host
arithmetic, made once for a row.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import weakref

import torch
from torch import Tensor

from ..pinned import copied
from ..plan import RowPlan
from ..threads import one_thread


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Consecutive tokens of one document that lie side by side on one rank.

    Attributes:
        rank: that holds it.
        start: its first row in the rank's local order.
        length: tokens.
        first: position in the row of its first token.
        previous: the fragment whose last state it starts from, as an index of all fragments; -1
            where it starts from zero. A branch starts from the end of its parent.
    """

    rank: int
    start: int
    length: int
    first: int
    previous: int


class Fragments:
    """All fragments of a row, `previous` before what comes after it, and those of one rank.

    Attributes:
        every: of all ranks.
        local: indices of this rank's, in local order.
        open: indices of those that another one starts from.
        rows: tokens on this rank.
        ranks: that share the row.
        orders: the order of the row's tokens on each device, for an exchange of heads.
    """

    def __init__(self, every: tuple[Fragment, ...], rank: int, ranks: int, rows: int) -> None:
        self.every = every
        self.rank, self.ranks, self.rows = rank, ranks, rows
        self.local = sorted(
            (i for i, f in enumerate(every) if f.rank == rank), key=lambda i: every[i].start
        )
        self.open = sorted({f.previous for f in every if f.previous >= 0})
        self._chunks: dict[tuple[int, torch.device], Chunks] = {}
        self._halo: dict[tuple[int, torch.device], Halo] = {}
        self.orders: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def open_local(self) -> list[int]:
        """Open ones of this rank, in the row's order."""
        return [i for i in self.open if self.every[i].rank == self.rank]

    @functools.cached_property
    def width(self) -> int:
        """The most open fragments that a rank holds."""
        counts = [0] * self.ranks
        for i in self.open:
            counts[self.every[i].rank] += 1
        return max(counts)

    @functools.cached_property
    def place(self) -> dict[int, int]:
        """Where the ranks' open fragments lie, `width` of each rank one after another."""
        counts, place = [0] * self.ranks, {}
        for i in self.open:
            rank = self.every[i].rank
            place[i] = rank * self.width + counts[rank]
            counts[rank] += 1
        return place

    def chunks(self, size: int, device: torch.device) -> Chunks:
        """This rank's fragments in chunks of `size` tokens. Copied to the device once."""
        key = (size, device)
        if key not in self._chunks:
            with one_thread():
                self._chunks[key] = Chunks(self, size, device)
        return self._chunks[key]

    def halo(self, width: int, device: torch.device) -> Halo:
        """For a convolution that reads `width` tokens before each. Copied to the device once."""
        key = (width, device)
        if key not in self._halo:
            with one_thread():
                self._halo[key] = Halo(self, width, device)
        return self._halo[key]

    def before(self, index: int, count: int) -> list[tuple[int, int]]:
        """(rank, local row) of up to `count` tokens before a fragment, the nearest one first."""
        found: list[tuple[int, int]] = []
        at = self.every[index].previous
        while at >= 0 and len(found) < count:
            f = self.every[at]
            take = min(f.length, count - len(found))
            found += [(f.rank, f.start + f.length - 1 - i) for i in range(take)]
            at = f.previous
        return found


class Chunks:
    """This rank's fragments, cut into chunks of equal size from each one's first token, and laid
    out step by step: the first chunks of all fragments, then the second ones, and so on, longer
    fragments first. So the chunks of one step lie side by side.

    A GPU waits for what is made here: nothing is made token by token but for `laid_out` and
    `taken_back`.

    Attributes:
        size: tokens of a chunk.
        order: this rank's fragments, the longest first: positions in `Fragments.local`.
        steps: [start, stop) of each step's chunks. Step s has the fragments order[: stop - start].
        counts: chunks of each fragment, in `order`.
        count: N, of all.
        in_order: the chunks' tokens are all rows, one after another.
        first_rows, lengths: [N] of the chunks' tokens, which are consecutive local rows.
        step_starts: [S] the first chunk of each step.
        step_counts: [F] `counts`.
        fragment_of: [N] the fragment of each chunk, as a place in `order`.
    """

    def __init__(self, fragments: Fragments, size: int, device: torch.device) -> None:
        local = [fragments.every[i] for i in fragments.local]
        self.size, self.device = size, device
        counts = [-(-f.length // size) for f in local]
        self.order = sorted(range(len(local)), key=lambda i: -counts[i])
        self.rank_of = {fragments.local[i]: at for at, i in enumerate(self.order)}
        self.counts = [counts[i] for i in self.order]
        self.steps = steps_of(self.counts)
        self.count = sum(counts)
        bounds = torch.tensor(self.steps, dtype=torch.int64).view(-1, 2)
        starts, widths = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
        step_of = torch.arange(len(bounds)).repeat_interleave(widths)
        fragment_of = torch.arange(self.count) - starts[step_of]
        first = torch.tensor([local[i].start for i in self.order], dtype=torch.int64)
        tokens = torch.tensor([local[i].length for i in self.order], dtype=torch.int64)
        before = step_of * size
        self._first = first[fragment_of] + before
        self._length = (tokens[fragment_of] - before).clamp(max=size)
        self.in_order = self.count * size == fragments.rows and bool(
            (self._first == size * torch.arange(self.count)).all()
        )
        self.first_rows = copied(self._first.to(torch.int32), device)
        self.lengths = copied(self._length.to(torch.int32), device)
        self.step_starts = copied(starts.to(torch.int32), device)
        self.step_counts = copied(torch.tensor(self.counts, dtype=torch.int32), device)
        self.fragment_of = copied(fragment_of, device)
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def index(self, values: list[int]) -> Tensor:
        """[len(values)] as a tensor on the device, copied there once."""
        key = tuple(values)
        if key not in self._indices:
            self._indices[key] = copied(torch.tensor(values, dtype=torch.int64), self.device)
        return self._indices[key]

    def part(self, chosen: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """The chunks of some fragments (places in `order`, ascending), step by step, and where
        each step begins and ends among them.
        """
        counts = [self.counts[at] for at in chosen]
        steps = steps_of(counts)
        index = [
            self.steps[s][0] + chosen[i] for s, (a, b) in enumerate(steps) for i in range(b - a)
        ]
        return torch.tensor(index), steps

    @functools.cached_property
    def _laid(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """[N * size] the local row of each place, row 0 where there is no token; [N * size, 1]
        which places hold a token, None where all do; [rows] where each local row lies.
        """
        with one_thread():
            place = torch.arange(self.size)
            filled = (place < self._length[:, None]).flatten()
            rows = (self._first[:, None] + place).flatten() * filled
            places = torch.empty(int(filled.sum()), dtype=torch.int64)
            places[rows[filled]] = filled.nonzero()[:, 0]
            every = bool(filled.all())
        return (
            copied(rows, self.device),
            None if every else copied(filled[:, None], self.device),
            copied(places, self.device),
        )

    def laid_out(self, x: Tensor) -> Tensor:
        """[rows, ...] -> [N * size, ...], zero where there is no token."""
        if self.in_order:
            return x
        rows, filled, _ = self._laid
        x = x.index_select(0, rows)
        if filled is None:
            return x
        return x * filled.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)

    def taken_back(self, x: Tensor) -> Tensor:
        """[N * size, ...] -> [rows, ...]."""
        return x if self.in_order else x.index_select(0, self._laid[2])


def steps_of(counts: list[int]) -> list[tuple[int, int]]:
    """[start, stop) of the chunks of each step, of fragments with so many chunks, descending."""
    steps, at = [], 0
    ascending = counts[::-1]
    for step in range(counts[0] if counts else 0):
        alive = len(counts) - bisect.bisect_right(ascending, step)
        steps.append((at, at + alive))
        at += alive
    return steps


class Halo:
    """Rows that fragments read of what comes before them, and where a convolution finds them.

    Attributes:
        sent: [S] local rows that this rank gives to all, padded to the same number on each rank;
            empty where no rank needs any.
        taps: [rows, width + 1] in each local row's window the rows that are read: this rank's,
            then those given by all ranks, then one row of zeros.
        stops: [rows] the local row at which each row's fragment ends.
        readers, reader_taps, read: [P] the local rows and their taps that read from before their
            fragment, and what they read; those that read this rank's own rows come first.
        own: how many of them do.
    """

    def __init__(self, fragments: Fragments, width: int, device: torch.device) -> None:
        needed = {i: fragments.before(i, width) for i in range(len(fragments.every))}
        given: list[list[int]] = [[] for _ in range(fragments.ranks)]
        if fragments.ranks > 1:
            wanted = {
                source
                for i, sources in needed.items()
                for source in sources
                if source[0] != fragments.every[i].rank
            }
            for rank, row in sorted(wanted):
                given[rank].append(row)
        most = max(len(rows) for rows in given)
        place = {
            (rank, row): fragments.rows + rank * most + at
            for rank, rows in enumerate(given)
            for at, row in enumerate(rows)
        }
        zero = fragments.rows + most * fragments.ranks
        # [F, width] what comes before each fragment, the nearest last
        listed = []
        for i in fragments.local:
            near = [row if rank == fragments.rank else place[rank, row] for rank, row in needed[i]]
            listed.append([zero] * (width - len(near)) + near[::-1])
        before = torch.tensor(listed, dtype=torch.int64).view(len(listed), width)
        self.device, self.rows, self.width = device, fragments.rows, width
        local = [fragments.every[i] for i in fragments.local]
        starts = torch.tensor([f.start for f in local], dtype=torch.int64)
        lengths = torch.tensor([f.length for f in local], dtype=torch.int64)
        self._fragment_of = torch.arange(len(local)).repeat_interleave(lengths)
        self._before, self._starts = before, starts
        row = torch.arange(fragments.rows)
        taps = row[:, None] + torch.arange(-width, 1)
        # The first rows of fragments read from before them.
        first = torch.arange(max(width, 1))
        rows = starts[:, None] + first
        inside = first < lengths[:, None]
        reads = torch.cat([before, rows], 1).unfold(1, width + 1, 1)
        taps[rows[inside]] = reads[inside]
        # Row i of a fragment reads from before it by its first `width - i` taps.
        outside = inside[..., None] & (torch.arange(width + 1) < width - first[:, None])
        at, of, tap = (outside & (reads < zero)).nonzero().unbind(1)
        readers, read = rows[at, of], reads[at, of, tap]
        order = torch.argsort((read >= fragments.rows).long(), stable=True)
        self.own = int((read < fragments.rows).sum())
        self.taps = copied(taps.to(torch.int32), device)
        stops = (starts + lengths)[self._fragment_of]
        self.stops = copied(stops.to(torch.int32), device)
        self.readers, self.reader_taps, self.read = (
            copied(x[order], device) for x in (readers, tap, read)
        )
        mine = given[fragments.rank]
        sent = torch.tensor(mine + [0] * (most - len(mine)), dtype=torch.int64)
        self.sent = copied(sent, device)

    @functools.cached_property
    def laid_out(self) -> tuple[Tensor, Tensor]:
        """For a convolution by PyTorch: [rows + F * width] the rows (as in `taps`) of all fragments
        one after another, each behind what comes before it; [rows] where each local row's window
        begins there.
        """
        with one_thread():
            row = torch.arange(self.rows)
            begins = row + self.width * self._fragment_of
            table = torch.empty(self.rows + self._before.numel(), dtype=torch.int64)
            table[begins + self.width] = row
            fragments = torch.arange(len(self._before))[:, None]
            at = self._starts[:, None] + self.width * fragments + torch.arange(self.width)
            table[at] = self._before
        return copied(table, self.device), copied(begins, self.device)


_of_plans: weakref.WeakKeyDictionary[RowPlan, dict[bool, Fragments]] = weakref.WeakKeyDictionary()


def fragments_of(plan: RowPlan, whole: bool = False) -> Fragments:
    """The fragments of a row. Made once.

    Args:
        whole: as if this rank held the row in natural order, which it does for its share of the
            heads after an exchange of heads.
    """
    held = _of_plans.setdefault(plan, {})
    if whole not in held:
        runs = [(0, 0, plan.length)] if whole else plan._natural_runs
        rows = plan.length if whole else plan.local_length
        ranks = 1 if whole else plan.ctx.size
        rank = 0 if whole else plan.ctx.rank
        held[whole] = Fragments(_cut(plan, runs, rows), rank, ranks, rows)
    return held[whole]


def _cut(plan: RowPlan, runs: list[tuple[int, int, int]], rows: int) -> tuple[Fragment, ...]:
    """Every document cut where it goes from one run of local rows to another."""
    every: list[Fragment] = []
    last: list[int] = []
    starts = [start for _, start, _ in runs]
    for s in plan.segments:
        previous = last[s.parent] if s.parent >= 0 else -1
        at = s.start
        while at < s.stop:
            offset, start, stop = runs[bisect.bisect_right(starts, at) - 1]
            end = min(stop, s.stop)
            rank, row = divmod(offset + at - start, rows)
            every.append(Fragment(rank, row, end - at, at, previous))
            previous = len(every) - 1
            at = end
        last.append(previous)
    return tuple(every)
