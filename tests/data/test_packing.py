"""Packing loses nothing, splits nothing, and depends on lengths alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longfactory.data.packing import pack

LENGTHS = st.lists(st.integers(1, 3000), max_size=120)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(3000, 5000))
def test_every_document_is_in_one_bin_and_bins_fit(lengths: list[int], capacity: int) -> None:
    packed = pack(lengths, capacity)
    assert sorted(i for b in packed.bins for i in b.tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in packed.bins)
    assert packed.tokens == sum(lengths)
    if lengths:
        assert packed.efficiency == pytest.approx(sum(lengths) / (len(packed.bins) * capacity))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(3000, 5000))
def test_data_order_is_kept_inside_and_between_bins(lengths: list[int], capacity: int) -> None:
    packed = pack(lengths, capacity)
    assert all((np.diff(b) > 0).all() for b in packed.bins)
    firsts = [int(b[0]) for b in packed.bins]
    assert firsts == sorted(firsts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 90))
def test_best_fit_decreasing_by_the_book(lengths: list[int], capacity: int) -> None:
    """The same number of bins, filled to the same sums, as a search through all bins."""
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        fits = [r for r in rooms if r >= n]
        if fits:
            best = rooms.index(min(fits))
            rooms[best] -= n
        else:
            rooms.append(capacity - n)
    packed = pack(lengths, capacity)
    assert sorted(capacity - sum(lengths[i] for i in b) for b in packed.bins) == sorted(rooms)


def test_small_documents_fill_a_row_of_a_million_tokens() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 60_000, 3000)
    packed = pack(lengths, 1 << 20)
    assert packed.efficiency > 0.95
    assert len(packed.bins) == -(-int(lengths.sum()) // (1 << 20))


def test_a_document_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="Document 1 has 11 tokens; a packed row has room for 10"):
        pack([3, 11], 10)
    with pytest.raises(ValueError, match="Document 0 has no tokens"):
        pack([0, 4], 10)
    assert pack([], 10).bins == []
