"""Rows of any documents and branches, for hypothesis."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from longfactory.sp.layout import Segment


@st.composite
def segmented_rows(draw: st.DrawFn, blocks: bool = False) -> tuple[int, int, int, list[Segment]]:
    """(ranks, ulysses degree, length, segments), with empty documents, branches, and branches of
    branches; with `blocks` some of them are blocks of tokens that see each other.
    """
    ranks = draw(st.integers(1, 5))
    ulysses = draw(st.sampled_from([u for u in range(1, ranks + 1) if ranks % u == 0]))
    length = 2 * ranks * draw(st.integers(1, 6))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    edges = [0, *cuts, length]
    segments: list[Segment] = []
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        parent = draw(st.integers(-1, i - 1)) if i and draw(st.booleans()) else -1
        segments.append(Segment(a, b, parent, block=blocks and draw(st.booleans())))
    return ranks, ulysses, length, segments
