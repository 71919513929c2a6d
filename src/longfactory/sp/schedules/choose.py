"""Which schedule and which layout a row gets, with a one-line reason. Pure arithmetic; the same
answer on every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..context import SequenceParallel, largest_ulysses_degree, neighbours
from ..layout import Segment, chunk_work, families

log = logging.getLogger(__name__)

Exchange = Literal["ring", "gather"]


class Choice(NamedTuple):
    """`ulysses` ranks share heads; among the rest, keys and values go round a ring or are gathered
    once.
    """

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
        return _told(
            ctx,
            Choice(
                share,
                "ring",
                "zigzag",
                f"ulysses: {n} ranks cannot share {ctx.heads} query heads evenly, so {rest}",
            ),
        )
    if ctx.mode == "llama3":
        return Choice(1, "gather", _layout(n, length, segments), "asked for")
    if ctx.mode == "usp":
        degree = ctx.ulysses_degree
        if degree is None:
            if ctx.heads is None:
                raise ValueError(
                    "usp needs ulysses_degree, ring_degree or the model's head count"
                    " (ctx.set_heads) to choose its degrees."
                )
            degree = largest_ulysses_degree(neighbours(n), ctx.heads)
        return Choice(degree, "ring", "zigzag", f"usp, ulysses {degree} x ring {n // degree}")
    return _told(
        ctx, _auto(ctx, length, segments, neighbours(n)), f", rows like this one of {length} tokens"
    )


def _told(ctx: SequenceParallel, choice: Choice, rows: str = "") -> Choice:
    """The choice, with its reason in the log once."""
    if choice.reason not in ctx.said:
        ctx.said.add(choice.reason)
        if ctx.rank == 0 and ctx.dp_rank == 0:
            log.info("sequence parallelism%s: %s", rows, choice.reason)
    return choice


def _auto(ctx: SequenceParallel, length: int, segments: Sequence[Segment], node: int) -> Choice:
    """What was measured for rows of this class (`sp.measure`), else the rule. `node`: neighbours in
    the group that share a machine.
    """
    n = ctx.size
    heads, kv_heads = ctx.heads, ctx.kv_heads or ctx.heads
    documents = sum(s.stop > s.start for s in segments)
    if heads is None or kv_heads is None:
        if documents > 1:
            return Choice(
                1,
                "gather",
                _layout(n, length, segments),
                "llama3: packed row, head counts not known",
            )
        return Choice(1, "ring", "zigzag", "zigzag-ring: one document, head counts not known")
    measured = ctx.measured.get(row_class(length, segments))
    if measured is not None and (measured.exchange == "ring" or _gatherable(length, kv_heads)):
        return choice_of(measured, n, length, segments)
    group = heads // kv_heads
    # Elements that a rank sends in the forward pass, for each local token and head dim.
    ring = 2 * kv_heads * (n - 1)
    ulysses = (2 * heads + 2 * max(kv_heads, n)) * (n - 1) / n
    # Under ulysses documents stay whole, and nothing of the exchange is hidden: 4 bytes of an
    # element, there and back, against 14 * keys FLOP of a query, head and number of its dim.
    exchanged = 4 * ulysses * ctx.flop_per_byte / (14 * mean_keys(length, segments) * heads)
    may_exchange = heads % n == 0 and n <= node and exchanged <= EXCHANGE
    if documents > 1 and n <= node:
        if may_exchange:
            return Choice(
                n, "ring", "zigzag", "ulysses: packed row of long documents, which stay whole"
            )
        # Only the keys of documents that cross a chunk's edge travel; chunks are dealt by work.
        return Choice(
            1, "gather", _layout(n, length, segments), "llama3: packed row, only needed keys travel"
        )
    if n > node > 1 and heads % node == 0:
        reason = f"usp: ulysses {node} inside a node, ring {n // node} between nodes"
        return Choice(node, "ring", "zigzag", reason)
    # Work on a key and value for each key head: 4 * D * s * g / 2 FLOP, with s local queries and g
    # query heads a key head. Their message: 4 * D bytes. It takes less time than the work from this
    # s * g on.
    hidden = length // n * group >= 2 * ctx.flop_per_byte
    if heads % n == 0 and ulysses < ring and not hidden:
        return Choice(
            n,
            "ring",
            "zigzag",
            f"ulysses: {heads} heads over {n} ranks send less than {kv_heads} key heads in a ring",
        )
    if documents > 1:
        return Choice(
            1, "gather", _layout(n, length, segments), "llama3: packed row over several nodes"
        )
    if n >= 4 and may_exchange and length // n <= SMALL:
        return Choice(
            n,
            "ring",
            "zigzag",
            f"ulysses: one document, a ring of {n} would cut it into tiles of {length // n} rows",
        )
    if 4 <= n <= node and _gatherable(length, kv_heads):
        # A ring of n merges n - 1 times; of gathered keys a query has two tiles at most.
        return Choice(
            1,
            "gather",
            "zigzag",
            f"llama3: one document, two merges instead of the {n - 1} of a ring",
        )
    why = "messages are hidden behind the tiles" if hidden else "fewest elements to send"
    return Choice(1, "ring", "zigzag", f"zigzag-ring: one document, {why}")


EXCHANGE = 0.25
"""Packed rows go by heads up to this share of attention's time for the exchange. Documents of a
median of 8k (shares of 0.10 on two H200 and of 0.16 on four) were 6 and 14 % faster by heads, those
of a median of 1k (0.46 on two) 20 % slower."""
SMALL = 16384
"""Up to so many local tokens of one document, four ranks or more lose more by the many small tiles
of a ring, and by merging them, than by an exchange of heads: 10 % against 7 and 9 on four H200 with
rows of 64k, 2 to 4 % against 4 at twice the length (benchmarks/results/auto_choice.md).
"""
GATHERED = 2**30
"""Bytes that gathered keys, values and their gradients may take."""
LONGEST = 131072
"""Longer rows are of the class of a row of so many tokens: all messages are hidden there."""


class Candidate(NamedTuple):
    """A schedule that `auto` may take."""

    ulysses: int
    exchange: Exchange

    def name(self, n: int) -> str:
        if self.exchange == "gather":
            return "llama3"
        return {1: "zigzag-ring", n: "ulysses"}.get(
            self.ulysses, f"usp {self.ulysses} x {n // self.ulysses}"
        )


def candidates(ctx: SequenceParallel, length: int) -> list[Candidate]:
    """What can be taken for rows of this length, on any rank alike. Heads are shared inside a
    machine.
    """
    heads, kv_heads = ctx.heads, ctx.kv_heads or ctx.heads
    out = [Candidate(1, "ring")]
    if kv_heads is not None and _gatherable(length, kv_heads):
        out.append(Candidate(1, "gather"))
    if heads is not None:
        near = neighbours(ctx.size)
        out += [
            Candidate(u, "ring")
            for u in range(2, ctx.size + 1)
            if ctx.size % u == near % u == heads % u == 0
        ]
    return out


def choice_of(candidate: Candidate, n: int, length: int, segments: Sequence[Segment]) -> Choice:
    """The choice that a measured candidate stands for, for a row of `length` tokens over `n`
    ranks.
    """
    layout = _layout(n, length, segments) if candidate.exchange == "gather" else "zigzag"
    return Choice(candidate.ulysses, candidate.exchange, layout, f"{candidate.name(n)}: measured")


def mean_keys(length: int, segments: Sequence[Segment]) -> float:
    """Keys that a query sees, on average."""
    return sum(chunk_work(length, 1, segments)) / length


def row_class(length: int, segments: Sequence[Segment]) -> tuple[int, int]:
    """Rows of one class are alike to a schedule: doublings of the length and of the mean number of
    keys that a query sees, rounded.
    """
    return round(math.log2(min(length, LONGEST))), round(
        math.log2(max(1.0, min(mean_keys(length, segments), LONGEST / 2)))
    )


def _gatherable(length: int, kv_heads: int) -> bool:
    """Whether the keys and values of the whole row (2 bytes) and their gradients (4 bytes) are
    small. Head dims are taken to be 128.
    """
    return 2 * 6 * 128 * kv_heads * length <= GATHERED


def _layout(n: int, length: int, segments: Sequence[Segment]) -> Literal["zigzag", "balanced"]:
    """Of one document zigzag where it is within 2 % of perfect balance: it has the fewest tiles. Of
    several `layout.balanced` weighs it against others.
    """
    if len(families(segments)) > 1:
        return "balanced"
    work = chunk_work(length, 2 * n, segments)
    load = [work[r] + work[2 * n - 1 - r] for r in range(n)]
    return "zigzag" if max(load) * n <= 1.02 * sum(load) else "balanced"
