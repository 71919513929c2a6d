"""Where the stretches of documents lie on each rank, against what is said of each token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from longfactory import sp
from longfactory.sp.recurrent import fragments
from longfactory.sp.recurrent.fragments import Fragment, Fragments, fragments_of

CPU = torch.device("cpu")


def stretches(seed: int, ranks: int, rows: int) -> tuple[Fragment, ...]:
    """Fragments of several lengths, in any order, each of which goes on where an earlier one ends,
    or starts anew.
    """
    draw, spots = random.Random(seed), []
    for rank in range(ranks):
        at = 0
        while at < rows:
            length = min(rows - at, draw.choice([1, 1, 2, 3, 5, 17, 64, 70, 130]))
            spots.append((rank, at, length))
            at += length
    draw.shuffle(spots)
    return tuple(
        Fragment(*spot, 0, draw.randrange(i) if i and draw.random() < 0.6 else -1)
        for i, spot in enumerate(spots)
    )


def every_rank(seed: int) -> list[Fragments]:
    ranks, rows = (1, 64) if seed == 0 else (1 + seed % 3, 40 + 37 * seed)
    every = stretches(seed, ranks, rows)
    return [Fragments(every, rank, ranks, rows) for rank in range(ranks)]


@pytest.mark.parametrize("seed", range(8))
def test_recurrent_chunks_hold_each_fragments_tokens_in_order(seed: int) -> None:
    for held in every_rank(seed):
        chunks = held.chunks(64, CPU)
        x = torch.randn(held.rows, 3)
        laid = chunks.laid_out(x).view(chunks.count, -1, 3)
        for at, place in enumerate(chunks.order):
            f = held.every[held.local[place]]
            mine = [chunks.steps[step][0] + at for step in range(chunks.counts[at])]
            assert all(int(chunks.fragment_of[chunk]) == at for chunk in mine)
            assert torch.equal(
                laid[mine].flatten(0, 1)[: f.length], x[f.start : f.start + f.length]
            )
            assert int(laid[mine].flatten(0, 1)[f.length :].count_nonzero()) == 0
            starts = [f.start + 64 * step for step in range(chunks.counts[at])]
            assert chunks.first_rows[mine].tolist() == starts
            assert chunks.lengths[mine].tolist() == [
                min(64, f.start + f.length - start) for start in starts
            ]
        assert torch.equal(chunks.taken_back(laid.flatten(0, 1)), x)


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_recurrent_windows_read_what_comes_before_each_token(seed: int, width: int) -> None:
    ranks = every_rank(seed)
    halos = [held.halo(width, CPU) for held in ranks]
    # The rows given by all ranks, by (rank, local row).
    given = [(rank, int(row)) for rank, halo in enumerate(halos) for row in halo.sent]
    for held, halo in zip(ranks, halos, strict=True):
        own = [(held.rank, row) for row in range(held.rows)]
        named: list[Any] = [*own, *given, None]
        table, begins = halo.laid_out
        readers = []
        for i in held.local:
            f = held.every[i]
            before = held.before(i, width)
            for at in range(f.length):
                row = f.start + at
                back = [(f.rank, row - j) for j in range(min(at, width) + 1)]
                back = (back + before)[: width + 1]
                window = [None] * (width + 1 - len(back)) + back[::-1]
                assert [named[tap] for tap in halo.taps[row]] == window
                begin = int(begins[row])
                assert [named[tap] for tap in table[begin : begin + width + 1]] == window
                assert int(halo.stops[row]) == f.start + f.length
                readers += [
                    (row, tap, source)
                    for tap, source in enumerate(window)
                    if tap < width - at and source is not None
                ]
        found = zip(
            halo.readers.tolist(), halo.reader_taps.tolist(), halo.read.tolist(), strict=True
        )
        assert sorted((row, tap, named[read]) for row, tap, read in found) == sorted(readers)
        assert [int(read) < held.rows for read in halo.read] == [
            at < halo.own for at in range(len(halo.read))
        ]


def test_recurrent_rows_are_laid_out_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(*args: Any) -> Any:
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(fragments, "Chunks", counted)
    monkeypatch.setattr(fragments, "Halo", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        held = fragments_of(sp.plan(160, None, sp.SequenceParallel()))
        held.chunks(64, torch.device("cpu"))
        held.halo(3, torch.device("cpu"))
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
