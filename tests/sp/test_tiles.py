from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfactory.sp.layout import Segment, balanced, contiguous, with_blocks, zigzag
from longfactory.sp.plan import HALO, MaskPlan
from longfactory.sp.tiles import Mask, Run, intersect, merge_rectangles, subtract
from plain_attention import plain_mask
from segmented_rows import segmented_rows


@settings(max_examples=250, deadline=None)
@given(
    row=segmented_rows(),
    kind=st.sampled_from(["zigzag", "balanced", "contiguous"]),
    window=st.none() | st.integers(1, 40),
    chunk=st.none() | st.integers(1, 40),
)
def test_tiles_of_all_ranks_are_the_plain_mask(
    row: tuple[int, int, int, list[Segment]], kind: str, window: int | None, chunk: int | None
) -> None:
    _all_ranks_are_the_plain_mask(row, kind, window, chunk)


@settings(max_examples=150, deadline=None)
@given(
    row=segmented_rows(blocks=True),
    kind=st.sampled_from(["zigzag", "balanced", "contiguous"]),
    window=st.none() | st.integers(1, 40),
)
def test_tiles_of_vision_blocks_are_the_plain_mask(
    row: tuple[int, int, int, list[Segment]], kind: str, window: int | None
) -> None:
    _all_ranks_are_the_plain_mask(row, kind, window, None)


def _all_ranks_are_the_plain_mask(
    row: tuple[int, int, int, list[Segment]], kind: str, window: int | None, chunk: int | None
) -> None:
    ranks, ulysses, length, segments = row
    ring = ranks // ulysses
    layout = {
        "zigzag": lambda: zigzag(length, ring),
        "balanced": lambda: balanced(length, ring, segments),
        "contiguous": lambda: contiguous(length, ring),
    }[kind]()
    expected = plain_mask(segments, length, window, chunk).int()
    by_ring = torch.zeros(length, length, dtype=torch.int32)
    by_gather = torch.zeros_like(by_ring)
    mask = Mask(segments, window, chunk)
    last_work = 0
    for rank in range(ring):
        plan = MaskPlan(mask, layout, rank)
        rows = _rows(layout.intervals[rank])
        own = plan.tiles(rank)
        firsts = list(itertools.takewhile(lambda tile: tile.first, own))
        assert not any(tile.first for tile in own[len(firsts) :])
        covered = [i for tile in firsts for i in range(tile.q.start, tile.q.stop)]
        assert covered == list(range(len(rows))), "the first tiles cover every query, once"
        if not any(s.block for s in segments):
            assert len(firsts) == 1
        for step in range(ring):
            source = (rank - step) % ring
            tiles = plan.tiles(source)
            _add(by_ring, tiles, rows, _rows(layout.intervals[source]))
            if tiles:
                last_work = max(last_work, step)
        _add(by_gather, own, rows, rows)
        _add(by_gather, plan.tiles(HALO), rows, _rows(plan.halo.fetched))
        assert plan.halo.anyone == (ring > 1 and bool(plan.last_step))
    assert torch.equal(by_ring, expected)
    assert torch.equal(by_gather, expected)
    assert MaskPlan(mask, layout, 0).last_step == last_work


def _rows(intervals: tuple[tuple[int, int], ...]) -> torch.Tensor:
    return torch.cat(
        [torch.zeros(0, dtype=torch.int64), *(torch.arange(a, b) for a, b in intervals)]
    )


def _add(count: torch.Tensor, tiles: tuple, q_rows: torch.Tensor, k_rows: torch.Tensor) -> None:
    for tile in tiles:
        seen = tile.mask()
        assert tile.q_len > 0 and tile.k_len > 0
        if tile.kind == "full" and tile.window is not None:
            assert tile.q_len <= tile.k_len, (
                "FlashAttention 2 cannot compute a rectangle in a window with more queries than keys"
            )
        assert seen.any(1).all(), (
            "every query of a tile sees a key: kernels disagree about rows that see nothing"
        )
        count[q_rows[tile.q].unsqueeze(1), k_rows[tile.k].unsqueeze(0)] += seen.int()


def test_vision_blocks_cut_segments_into_chains() -> None:
    found = with_blocks([Segment(0, 9), Segment(9, 12, 0)], [(2, 4), (4, 6), (9, 10)])
    assert found == (
        Segment(0, 2),
        Segment(2, 4, 0, block=True),
        Segment(4, 6, 1, block=True),
        Segment(6, 9, 2),
        Segment(9, 10, 3, block=True),
        Segment(10, 12, 4),
    )
    with pytest.raises(ValueError, match="no one document"):
        with_blocks([Segment(0, 5), Segment(5, 9)], [(4, 6)])


def test_a_zigzag_rank_has_three_tiles_at_most() -> None:
    """One causal square, and for each other rank one rectangle."""
    layout = zigzag(64, 4)
    for rank in range(4):
        plan = MaskPlan(Mask([Segment(0, 64)]), layout, rank)
        assert [t.kind for t in plan.tiles(rank)] == ["causal"]
        for source in range(4):
            if source != rank:
                (tile,) = plan.tiles(source)
                assert tile.kind == "full" and tile.q_len * tile.k_len == 128
        assert [t.kind for t in plan.tiles(HALO)] == ["full"] * (1 if rank in (0, 3) else 2)


def test_one_rank_has_one_tile_whatever_the_documents() -> None:
    plan = MaskPlan(
        Mask([Segment(0, 5), Segment(5, 5), Segment(5, 9), Segment(9, 16)]), contiguous(16, 1), 0
    )
    (tile,) = plan.tiles(0)
    assert tile.kind == "varlen" and tile.cu_seqlens == (0, 5, 9, 16) and tile.max_seqlen == 7


def test_shared_prompt_is_one_rectangle_for_all_its_branches() -> None:
    segments = [Segment(0, 10), Segment(10, 13, 0), Segment(13, 20, 0)]
    diagonal, prompt = MaskPlan(Mask(segments), contiguous(20, 1), 0).tiles(0)
    assert diagonal.kind == "varlen"
    assert (prompt.kind, prompt.q, prompt.k) == ("full", slice(10, 20), slice(0, 10))


def test_window_fetches_only_its_halo() -> None:
    plan = MaskPlan(Mask([Segment(0, 64)], window=5), contiguous(64, 4), 2)
    assert plan.halo.fetched == ((28, 32),)
    assert plan.last_step == 1


def test_window_wider_than_a_tile_needs_no_window() -> None:
    tiles = Mask([Segment(0, 16)], window=16).tiles([Run(0, 8, 16)], [Run(0, 0, 8)], same=False)
    assert [(t.kind, t.window) for t in tiles] == [("full", None)]


@pytest.mark.parametrize(
    ("a", "b", "both", "only_a"),
    [
        ([(0, 10)], [(2, 3), (5, 7)], ((2, 3), (5, 7)), ((0, 2), (3, 5), (7, 10))),
        ([(0, 4), (6, 9)], [(3, 8)], ((3, 4), (6, 8)), ((0, 3), (8, 9))),
        ([(0, 4)], [], (), ((0, 4),)),
    ],
)
def test_interval_arithmetic(a: list, b: list, both: tuple, only_a: tuple) -> None:
    assert intersect(a, b) == both
    assert subtract(a, b) == only_a


def test_rectangles_that_touch_become_one() -> None:
    assert merge_rectangles([(0, 4, 0, 4), (4, 8, 4, 8), (4, 8, 0, 4), (0, 4, 4, 8)]) == [
        (0, 8, 0, 8)
    ]
    assert merge_rectangles([(0, 4, 0, 4), (4, 8, 4, 8)]) == [(0, 4, 0, 4), (4, 8, 4, 8)]
