"""Which schedule and which layout a row gets, with a one-line reason. Pure arithmetic; the same answer on every rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..context import SequenceParallel, largest_ulysses_degree, neighbours
from ..layout import Segment, chunk_work

log = logging.getLogger(__name__)

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
        share = n if ctx.heads is None else largest_ulysses_degree(n, ctx.heads)
        if share == n:
            return Choice(n, "ring", "zigzag", "asked for")
        rest = f"ulysses {share} x ring {n // share}" if share > 1 else f"a ring of {n}"
        return _told(ctx, Choice(share, "ring", "zigzag", f"ulysses: {n} ranks cannot share {ctx.heads} query heads evenly, so {rest}"))
    if ctx.mode == "llama3":
        return Choice(1, "gather", _layout(n, length, segments), "asked for")
    if ctx.mode == "usp":
        degree = ctx.ulysses_degree
        if degree is None:
            if ctx.heads is None:
                raise ValueError("usp needs ulysses_degree, ring_degree or the model's head count (ctx.set_heads) to choose its degrees.")
            degree = largest_ulysses_degree(neighbours(n), ctx.heads)
        return Choice(degree, "ring", "zigzag", f"usp, ulysses {degree} x ring {n // degree}")
    return _told(ctx, _auto(ctx, length, segments, neighbours(n)), f", rows like this one of {length} tokens")


def _told(ctx: SequenceParallel, choice: Choice, rows: str = "") -> Choice:
    """The choice, with its reason in the log once."""
    if choice.reason not in ctx.said:
        ctx.said.add(choice.reason)
        if ctx.rank == 0 and ctx.dp_rank == 0:
            log.info("sequence parallelism%s: %s", rows, choice.reason)
    return choice


def _auto(ctx: SequenceParallel, length: int, segments: Sequence[Segment], node: int) -> Choice:
    """`node`: neighbours in the group that share a machine."""
    n = ctx.size
    heads, kv_heads = ctx.heads, ctx.kv_heads or ctx.heads
    documents = sum(s.stop > s.start for s in segments)
    if heads is None or kv_heads is None:
        if documents > 1:
            return Choice(1, "gather", _layout(n, length, segments), "llama3: packed row, head counts not known")
        return Choice(1, "ring", "zigzag", "zigzag-ring: one document, head counts not known")
    group = heads // kv_heads
    if documents > 1 and n <= node:
        # Only the keys of documents that cross a chunk's edge travel; chunks are dealt by work.
        return Choice(1, "gather", _layout(n, length, segments), "llama3: packed row, only needed keys travel")
    if n > node > 1 and heads % node == 0:
        reason = f"usp: ulysses {node} inside a node, ring {n // node} between nodes"
        return Choice(node, "ring", "zigzag", reason)
    # Elements that a rank sends in the forward pass, for each local token and head dim.
    ring = 2 * kv_heads * (n - 1)
    ulysses = (2 * heads + 2 * max(kv_heads, n)) * (n - 1) / n
    # Work on a key and value for each key head: 4 * D * s * g / 2 FLOP, with s local queries and g query heads a key head. Their message:
    # 4 * D bytes. It takes less time than the work from this s * g on.
    hidden = length // n * group >= 2 * ctx.flop_per_byte
    if heads % n == 0 and ulysses < ring and not hidden:
        return Choice(n, "ring", "zigzag", f"ulysses: {heads} heads over {n} ranks send less than {kv_heads} key heads in a ring")
    if documents > 1:
        return Choice(1, "gather", _layout(n, length, segments), "llama3: packed row over several nodes")
    why = "messages are hidden behind the tiles" if hidden else "fewest elements to send"
    return Choice(1, "ring", "zigzag", f"zigzag-ring: one document, {why}")


def _layout(n: int, length: int, segments: Sequence[Segment]) -> Literal["zigzag", "balanced"]:
    """Zigzag where it is within 2 % of perfect balance, for it has the fewest tiles."""
    work = chunk_work(length, 2 * n, segments)
    load = [work[r] + work[2 * n - 1 - r] for r in range(n)]
    return "zigzag" if max(load) * n <= 1.02 * sum(load) else "balanced"
