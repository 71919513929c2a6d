from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfactory.sp.layout import (
    FETCH,
    SIDE,
    TILE,
    Layout,
    Segment,
    balanced,
    chunk_work,
    contiguous,
    cost,
    families,
    filled,
    join,
    whole,
    zigzag,
)


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.integers(1, 8),
    parts=st.integers(1, 4),
    blocks=st.integers(1, 9),
    kind=st.sampled_from(["zigzag", "contiguous", "balanced", "whole"]),
    data=st.data(),
)
def test_layouts_deal_every_token_once_and_evenly(
    ranks: int, parts: int, blocks: int, kind: str, data: st.DataObject
) -> None:
    length = 2 * ranks * parts * blocks
    cut = data.draw(st.integers(0, length))
    segments = [Segment(0, cut), Segment(cut, length)]
    kinds = {
        "balanced": lambda: balanced(length, ranks, segments),
        "whole": lambda: whole(length, ranks, segments, 0.5),
        "zigzag": lambda: zigzag(length, ranks),
        "contiguous": lambda: contiguous(length, ranks),
    }
    layout = kinds[kind]()
    for dealt in (layout, layout.split(parts)):
        rows = [[t for a, b in intervals for t in range(a, b)] for intervals in dealt.intervals]
        assert sorted(t for r in rows for t in r) == list(range(length))
        assert {len(r) for r in rows} == {dealt.local_length}
        assert all(r == sorted(r) for r in rows)
    together = [
        t
        for intervals in layout.split(parts).intervals[:parts]
        for a, b in intervals
        for t in range(a, b)
    ]
    assert together == [t for a, b in layout.intervals[0] for t in range(a, b)], (
        "parts follow each other"
    )


def test_zigzag_pairs_early_and_late_chunks() -> None:
    assert zigzag(16, 2) == Layout(16, (((0, 4), (12, 16)), ((4, 12),)))


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="Pad the row"):
        zigzag(15, 2)


def test_chunk_work_counts_the_plain_mask() -> None:
    from plain_attention import plain_mask

    segments = [Segment(0, 7), Segment(7, 7), Segment(7, 20, 0), Segment(20, 24)]
    seen = plain_mask(segments, 24).sum(1)
    assert chunk_work(24, 6, segments) == [int(x.sum()) for x in torch.split(seen, 4)]


@pytest.mark.parametrize(
    ("median", "sigma", "cap", "most"), [(8192, 1.0, 65536, 1.3), (1024, 1.2, 32768, 1.25)]
)
def test_packed_rows_are_balanced(median: int, sigma: float, cap: int, most: float) -> None:
    """40 packs of 131072 tokens with heavy-tailed documents over 4 ranks: what the busiest rank has
    to do over a fourth of what one GPU has. Chunks dealt by work alone have 1.46 and 1.63.
    """
    rng = random.Random(0)
    ratios = []
    for _ in range(40):
        length = 131072
        segments: list[Segment] = []
        while not segments or segments[-1].stop < length:
            start = segments[-1].stop if segments else 0
            size = int(min(cap, max(16, median * rng.lognormvariate(0, sigma))))
            segments.append(Segment(start, min(length, start + size)))
        (alone,) = cost(contiguous(length, 1), segments)
        busiest = max(cost(balanced(length, 4, segments, 512), segments))
        ratios.append(busiest * 4 / alone)
    assert sum(ratios) / len(ratios) <= most


def test_short_documents_fill_ranks_so_that_none_is_cut() -> None:
    """Long ones are dealt by work; the rest adds up to each rank's room."""
    sizes = [9000, 7000, 5000, 11, 700, 233, 1056, 2000, 1500, 3000, 988]
    edges = [0, *itertools.accumulate(sizes)]
    segments = [Segment(a, b) for a, b in itertools.pairwise(edges)]
    layout = filled(edges[-1], 2, segments, 7)
    assert layout is not None
    cuts = {edge for intervals in layout.intervals for interval in intervals for edge in interval}
    assert cuts <= set(edges)
    assert [sum(b - a for a, b in held) for held in layout.intervals] == [edges[-1] // 2] * 2
    odd = [Segment(0, 5), Segment(5, 9), Segment(9, 12)]
    assert filled(12, 2, odd, 2) is None, "5, 4 and 3 do not make two sixes"
    assert filled(12, 2, odd, 1) is None


def test_what_a_rank_has_to_do() -> None:
    """Pairs, and for each tile what it takes beside them: two long documents and a run of two short
    ones are three; a cut is one more, with a fetch for everyone.
    """
    segments = [Segment(0, 3000), Segment(3000, 4000), Segment(4000, 5000), Segment(5000, 8000)]
    pairs = sum(chunk_work(8000, 8, segments))
    assert cost(contiguous(8000, 1), segments) == [pairs + 3 * TILE]
    first, second = chunk_work(8000, 2, segments)
    assert cost(contiguous(8000, 2), segments) == [first + 2 * TILE, second + 2 * TILE]
    first, second = chunk_work(6000, 2, [Segment(0, 6000)])
    assert cost(contiguous(6000, 2), [Segment(0, 6000)]) == [
        first + TILE + FETCH,
        second + 2 * TILE + 3000 * SIDE + FETCH,
    ]


def test_documents_that_fit_stay_whole() -> None:
    """Twelve documents of four lengths, the same of each for every rank; a row in which one document
    has most of the work is cut.
    """
    sizes = [5, 3, 2, 6] * 3
    edges = [0, *itertools.accumulate(sizes)]
    segments = [Segment(a, b) for a, b in itertools.pairwise(edges)]
    held = balanced(48, 3, segments).intervals
    cuts = {edge for intervals in held for interval in intervals for edge in interval}
    assert cuts <= set(edges), "every rank's rows begin and end with documents"
    one = [Segment(0, 29000), *(Segment(a, a + 1000) for a in range(29000, 60000, 1000))]
    costs = cost(balanced(60000, 2, one), one)
    assert max(costs) < 0.8 * max(cost(whole(60000, 2, one), one))


def test_a_prompt_and_its_answers_are_one_family() -> None:
    segments = [Segment(0, 4), Segment(4, 7, 0), Segment(7, 9, 0), Segment(9, 9), Segment(9, 12)]
    assert families(segments) == [([0, 1, 2], (0, 9)), ([4], (9, 12))]


def test_join() -> None:
    assert join([(5, 6), (0, 2), (2, 3), (4, 4), (1, 2)]) == ((0, 3), (5, 6))
