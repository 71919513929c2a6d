"""Which schedule and which layout a row gets, with a one-line reason. Pure arithmetic; the same answer on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..context import SequenceParallel, largest_ulysses_degree
from ..layout import Segment, chunk_work

Exchange = Literal["ring", "gather"]


class Choice(NamedTuple):
    """`ulysses` ranks share heads; among the rest, keys and values go round a ring or are gathered once."""

    ulysses: int
    exchange: Exchange
    layout: Literal["zigzag", "balanced"]
    reason: str


def choose(ctx: SequenceParallel, length: int, segments: Sequence[Segment]) -> Choice:
    """The schedule that `ctx.mode` asks for, or, for `auto`, the cheapest.

    Raises:
        ValueError: `usp` without degrees and without head counts.
    """
    n = ctx.size
    if n == 1:
        return Choice(1, "ring", "zigzag", "one rank")
    if ctx.mode == "zigzag-ring":
        return Choice(1, "ring", "zigzag", "asked for")
    if ctx.mode == "ulysses":
        return Choice(n, "ring", "zigzag", "asked for")
    if ctx.mode == "llama3":
        return Choice(1, "gather", _layout(n, length, segments), "asked for")
    if ctx.mode == "usp":
        degree = ctx.ulysses_degree
        if degree is None:
            if ctx.heads is None:
                raise ValueError("usp needs ulysses_degree, ring_degree or the model's head count (ctx.set_heads) to choose its degrees.")
            degree = largest_ulysses_degree(n, ctx.heads)
        return Choice(degree, "ring", "zigzag", f"usp, ulysses {degree} x ring {n // degree}")
    return _auto(ctx, length, segments)


def _auto(ctx: SequenceParallel, length: int, segments: Sequence[Segment]) -> Choice:
    n = ctx.size
    layout = _layout(n, length, segments)
    if layout == "balanced":
        return Choice(1, "gather", layout, "packed row: chunks dealt by work, only the needed keys travel")
    return Choice(1, "ring", "zigzag", "one long document: the ring hides its messages behind the tiles")


def _layout(n: int, length: int, segments: Sequence[Segment]) -> Literal["zigzag", "balanced"]:
    """Zigzag where it is within 2 % of perfect balance, for it has the fewest tiles."""
    work = chunk_work(length, 2 * n, segments)
    load = [work[r] + work[2 * n - 1 - r] for r in range(n)]
    return "zigzag" if max(load) * n <= 1.02 * sum(load) else "balanced"
