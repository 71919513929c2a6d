from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfactory.sp.layout import Layout, Segment, balanced, chunk_work, contiguous, join, zigzag


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.integers(1, 8),
    parts=st.integers(1, 4),
    blocks=st.integers(1, 9),
    kind=st.sampled_from(["zigzag", "contiguous", "balanced"]),
    data=st.data(),
)
def test_layouts_deal_every_token_once_and_evenly(
    ranks: int, parts: int, blocks: int, kind: str, data: st.DataObject
) -> None:
    length = 2 * ranks * parts * blocks
    cut = data.draw(st.integers(0, length))
    segments = [Segment(0, cut), Segment(cut, length)]
    layout = (
        balanced(length, ranks, segments)
        if kind == "balanced"
        else (zigzag if kind == "zigzag" else contiguous)(length, ranks)
    )
    for dealt in (layout, layout.split(parts)):
        rows = [[t for a, b in intervals for t in range(a, b)] for intervals in dealt.intervals]
        assert sorted(t for r in rows for t in r) == list(range(length))
        assert {len(r) for r in rows} == {dealt.local_length}
        assert all(r == sorted(r) for r in rows)
    whole = [
        t
        for intervals in layout.split(parts).intervals[:parts]
        for a, b in intervals
        for t in range(a, b)
    ]
    assert whole == [t for a, b in layout.intervals[0] for t in range(a, b)], (
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


@pytest.mark.parametrize(("median", "sigma", "cap"), [(8192, 1.0, 65536), (1024, 1.2, 32768)])
def test_packed_rows_are_balanced_within_ten_percent(median: int, sigma: float, cap: int) -> None:
    """40 packs of 131072 tokens with heavy-tailed documents over 8 ranks: work of the busiest rank
    over the mean.
    """
    rng = random.Random(0)
    ratios = []
    for _ in range(40):
        length, segments = 131072, []
        while not segments or segments[-1].stop < length:
            start = segments[-1].stop if segments else 0
            size = int(min(cap, max(16, median * rng.lognormvariate(0, sigma))))
            segments.append(Segment(start, min(length, start + size)))
        layout = balanced(length, 8, segments, 512)
        work = chunk_work(length, 8 * 64, segments)
        size = length // len(work)
        load = [
            sum(work[c] for a, b in intervals for c in range(a // size, b // size))
            for intervals in layout.intervals
        ]
        ratios.append(max(load) * 8 / sum(load))
    assert sum(ratios) / len(ratios) <= 1.10
    assert sorted(ratios)[36] <= 1.10, "nine packs of ten"


def test_join() -> None:
    assert join([(5, 6), (0, 2), (2, 3), (4, 4), (1, 2)]) == ((0, 3), (5, 6))
