"""Tiles cut to few shapes compute the same mask, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_ranks import BRANCHES, PACKED, compare
from longfactory.sp import Segment, bulk, kernels
from longfactory.sp.bulk import bulk_tiles
from longfactory.sp.layout import balanced
from longfactory.sp.plan import HALO, MaskPlan
from longfactory.sp.tiles import Mask, Tile
from longfactory.testing import run_ranks
from segmented_rows import segmented_rows


def count(tiles: tuple[Tile, ...], rows: int, cols: int) -> torch.Tensor:
    out = torch.zeros(rows, cols, dtype=torch.int32)
    for tile in tiles:
        assert tile.q_len > 0 and tile.k_len > 0, "kernels die on empty tiles"
        mask = tile.mask().int()
        inside = out[tile.q, tile.k]  # a tile may end beyond the rank's rows
        assert mask.sum() == mask[: len(inside), : inside.shape[1]].sum()
        inside += mask[: len(inside), : inside.shape[1]]
    return out


@settings(max_examples=150, deadline=None)
@given(row=segmented_rows(), unit=st.integers(1, 5), window=st.none() | st.integers(1, 9))
def test_cut_tiles_are_the_same_mask(
    row: tuple[int, int, int, list[Segment]], unit: int, window: int | None
) -> None:
    ranks, _, length, segments = row
    layout = balanced(length, ranks, segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "SMALLEST", 3)
        patch.setattr(bulk, "unit", lambda length, shapes: unit)
        for rank in range(ranks):
            plan = MaskPlan(Mask(segments, window), layout, rank)
            for source, cols in (
                (rank, layout.local_length),
                (HALO, sum(b - a for a, b in plan.halo.fetched)),
            ):
                whole, cut = plan.tiles(source), plan.tiles(source, bulk=True)
                assert torch.equal(
                    count(cut, layout.local_length, cols), count(whole, layout.local_length, cols)
                )
            touched = torch.zeros(layout.local_length, dtype=torch.int32)
            for tile in plan.tiles(rank, bulk=True):
                assert tile.first == bool((touched[tile.rows] == 0).all()), "first tiles come first"
                assert not tile.first or tile.q == tile.k, (
                    "first tiles are squares: each row is once a query and once a key of them"
                )
                touched[tile.rows] += 1
            assert (touched > 0).all()


def test_shapes_are_few() -> None:
    """Documents of 4096 to 32768 tokens, each length once: squares and rectangles have some dozen
    shapes.
    """
    squares, rectangles = set(), set()
    for length in range(4096, 32768, 61):
        for t in bulk_tiles(
            [Tile(slice(0, length), slice(0, length), "causal", first=True)], 65536
        ):
            squares.add(t.q_len)
        for t in bulk_tiles([Tile(slice(100, 8292), slice(0, length), "full")], 8192 * 2):
            if t.k_len >= 4096:
                rectangles.add((t.q_len, t.k_len))
    assert len(squares) <= 60 and len(rectangles) <= 30
    assert max(x % 128 for x in squares) == 0


def test_documents_of_2048_tokens_get_calls_of_their_own_and_shorter_ones_one_call() -> None:
    edges = [0, 2048, 2500, 3000, 5129, 7176, 8192]
    tile = Tile(slice(0, 8192), slice(0, 8192), "varlen", tuple(edges), first=True)
    found = [(t.kind, t.q.start, t.q.stop, t.rows.stop) for t in bulk_tiles([tile], 8192)]
    assert found == [
        ("causal", 0, 2048, 2048),
        ("varlen", 2048, 3000, 3000),
        ("causal", 3000, 5176, 5129),  # 2,129 tokens, and 47 of the next document
        ("varlen", 5129, 8192, 8192),
    ]
    many = Tile(slice(0, 8192), slice(0, 8192), "varlen", tuple(range(0, 8193, 512)), first=True)
    assert [t.kind for t in bulk_tiles([many], 8192)] == ["varlen"]


def test_a_long_document_at_the_end_of_the_row_becomes_a_multiple_of_128() -> None:
    """32,210 tokens and the padding to 32,256, which is less than the next of the few lengths."""
    tile = Tile(slice(0, 32256), slice(0, 32256), "varlen", (0, 32210, 32256), first=True)
    square, padding = bulk_tiles([tile], 32256)
    assert (square.q_len, square.k_len, square.rows) == (32256, 32256, slice(0, 32210))
    assert padding.q == slice(32210, 32256)
    short = Tile(slice(0, 9088), slice(0, 9088), "varlen", (0, 9000, 9088), first=True)
    square = bulk_tiles([short], 9088)[0]
    assert (square.q_len, square.rows) == (9216, slice(0, 9000)), "one of the few lengths"


def test_a_tile_beyond_the_rows_is_padded_with_zeros() -> None:
    x = torch.arange(1.0, 25.0).view(4, 2, 3)
    padded = kernels.rows_of(x, slice(1, 6))
    assert torch.equal(padded[:3], x[1:]) and padded.shape == (5, 2, 3)
    assert not padded[3:].any()
    assert kernels.rows_of(x, slice(1, 4)).data_ptr() == x[1:].data_ptr()


def test_additional_queries_never_leave_the_rank() -> None:
    tile, spare = bulk_tiles([Tile(slice(3000, 8000), slice(0, 6000), "full")], 8000)
    assert (
        tile.q.stop <= 8000 and tile.rows == slice(3000, 8000) and spare.rows == slice(3000, 8000)
    )
    assert (spare.k.stop, tile.k.stop) == (tile.k.start, 6000)


def compare_in_bulk(*args: object, **kwargs: object) -> dict[str, float]:
    originals = bulk.SMALLEST, bulk.unit, kernels.bulk
    bulk.SMALLEST, bulk.unit, kernels.bulk = 3, lambda length, shapes: 4, lambda *a: True  # type: ignore[assignment]
    try:
        return compare(*args, **kwargs)  # type: ignore[arg-type]
    finally:
        bulk.SMALLEST, bulk.unit, kernels.bulk = originals  # type: ignore[assignment]


@pytest.mark.processes
@pytest.mark.parametrize("segments", [PACKED, BRANCHES], ids=["packed", "branches"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_output_and_gradients(mode: str, segments: tuple[Segment, ...], sinks: bool) -> None:
    for errors in run_ranks(4, compare_in_bulk, mode, None, segments, sinks=sinks):
        assert max(errors.values()) <= 1e-12, errors
