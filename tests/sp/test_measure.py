"""`auto` by the clock: one choice on all ranks, that of the slowest; kept for rows of the class;
exact as every schedule is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longfactory import sp
from longfactory.sp import Segment, SequenceParallel
from longfactory.sp.measure import ROUNDS, Measure, cut
from longfactory.sp.schedules.choose import LONGEST, Candidate, candidates, row_class
from longfactory.testing import run_ranks
from plain_attention import plain_attention, plain_mask, random_inputs

LENGTH = 64
PACKED = (Segment(0, 37), Segment(37, 39), Segment(39, LENGTH))
RING, GATHER, BY_TWO, ULYSSES = (
    Candidate(1, "ring"),
    Candidate(1, "gather"),
    Candidate(2, "ring"),
    Candidate(4, "ring"),
)


def measured(
    table: list[dict[Candidate, float]],
    rows: list[tuple[int, tuple[Segment, ...]]],
    ordered: bool = False,
) -> Any:
    """On each rank: what was kept, the choice for each row, calls of the clock, the largest
    difference from plain attention.

    `table`: seconds that each rank's clock says. The steps are run as well.
    """
    ctx = SequenceParallel.create(4, "auto", heads=8, kv_heads=2)
    names, calls = candidates(ctx, LENGTH), []

    def clock(step: Any) -> float:
        step()
        calls.append(names[len(calls) % len(names)])
        return table[ctx.rank][calls[-1]]

    torch.use_deterministic_algorithms(ordered)
    try:
        measure = Measure(ctx, 8, 8, torch.float64, torch.device("cpu"), seconds=clock)
        choices = []
        for length, segments in rows:
            measure(length, segments)
            plan = sp.plan(length, segments, ctx)
            choices.append((plan.choice.ulysses, plan.choice.exchange, plan.choice.layout))
    finally:
        torch.use_deterministic_algorithms(False)
    q, k, v, dout = random_inputs(length, 8, 2, 8)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*plain, plain_mask(segments, length), 0.3)  # type: ignore[arg-type]
    expected.backward(dout)
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sp.attention(*(sp.shard(x, plan) for x in ours), plan, scale=0.3)
    out.backward(sp.shard(dout, plan))
    errors = [(sp.gather(out.detach(), plan) - expected).abs().max().item()]
    for a, b in zip(ours, plain, strict=True):
        dist.all_reduce(a.grad)
        errors.append((a.grad - b.grad).abs().max().item())  # type: ignore[operator]
    return dict(ctx.measured), choices, len(calls), max(errors)


@pytest.mark.processes
def test_the_slowest_rank_decides_for_all() -> None:
    """Ulysses is fastest on three ranks and slowest on the fourth; the gather is second everywhere."""
    table = [{RING: 5.0, GATHER: 2.0, BY_TWO: 3.0, ULYSSES: 1.0} for _ in range(4)]
    table[3][ULYSSES] = 9.0
    rows = [(LENGTH, PACKED), (LENGTH, PACKED)]
    for kept, choices, calls, error in run_ranks(4, measured, table, rows):
        assert kept == {row_class(LENGTH, PACKED): GATHER}
        assert choices == [(1, "gather", "balanced")] * 2
        assert calls == 4 * 3, "rows of one class are measured once; slow ones in two rounds"
        assert error <= 1e-12


@pytest.mark.processes
@pytest.mark.parametrize("fastest", [RING, BY_TWO, ULYSSES])
def test_each_candidate_can_be_chosen_and_is_exact(fastest: Candidate) -> None:
    table = [{c: 1.0 + (c != fastest) for c in (RING, GATHER, BY_TWO, ULYSSES)}] * 4
    for _, choices, _, error in run_ranks(4, measured, table, [(LENGTH, PACKED)]):
        assert choices == [(*fastest, "zigzag")] and error <= 1e-12


@pytest.mark.processes
def test_what_is_as_fast_is_chosen_in_the_same_order() -> None:
    """Half a percent is noise: the first candidate is taken, whichever of them was ahead."""
    for first in (1.0, 1.005):
        table = [{RING: first, GATHER: 2.005 - first, BY_TWO: 2.0, ULYSSES: 2.0}] * 4
        assert [kept for kept, *_ in run_ranks(4, measured, table, [(LENGTH, PACKED)])] == [
            {row_class(LENGTH, PACKED): RING}
        ] * 4


@pytest.mark.processes
def test_short_steps_are_timed_some_at_a_time() -> None:
    """A warm one, a single one, and as many rounds of several as there are."""
    table = [{c: 0.004 + 0.001 * (c != ULYSSES) for c in (RING, GATHER, BY_TWO, ULYSSES)}] * 4
    for kept, _, calls, error in run_ranks(4, measured, table, [(LENGTH, PACKED)]):
        assert list(kept.values()) == [ULYSSES]
        assert calls == 4 * (2 + ROUNDS) and error <= 1e-12


@pytest.mark.processes
def test_deterministic_runs_go_by_the_rule() -> None:
    table = [{c: 1.0 for c in (RING, GATHER, BY_TWO, ULYSSES)}] * 4
    for kept, _, calls, _ in run_ranks(4, measured, table, [(LENGTH, PACKED)], ordered=True):
        assert (kept, calls) == ({}, 0)


def test_a_long_row_is_measured_with_what_it_can_take() -> None:
    """It is timed on its first 131072 tokens, whose keys could be gathered; its own could not."""
    ctx = SequenceParallel(size=4, mode="auto", heads=28, kv_heads=4)
    measure = Measure(ctx, 8, 8, torch.float64, torch.device("cpu"))
    asked: list[tuple[int, list[Candidate]]] = []

    def times(length: int, segments: Any, names: list[Candidate]) -> dict[Candidate, float]:
        asked.append((length, names))
        return dict.fromkeys(names, 1.0)

    measure._times = times  # type: ignore[method-assign]
    measure(2**20, (Segment(0, 2**20),))
    ((length, names),) = asked
    assert length == LONGEST and Candidate(1, "gather") not in names
    assert ctx.measured == {row_class(2**20, [Segment(0, 2**20)]): RING}


def test_classes_of_rows() -> None:
    one = row_class(65536, [Segment(0, 65536)])
    assert one == (16, 15) and row_class(70000, [Segment(0, 70000)]) == one
    halves = [Segment(0, 32768), Segment(32768, 65536)]
    assert row_class(65536, halves) == (16, 14)
    assert (
        row_class(2**20, [Segment(0, 2**20)])
        == row_class(LONGEST, [Segment(0, LONGEST)])
        == (17, 16)
    )
    assert cut([Segment(0, 10), Segment(10, 30), Segment(30, 40)], 20) == (
        Segment(0, 10),
        Segment(10, 20),
    )


def test_candidates_are_those_that_can_run() -> None:
    names = lambda **keys: [  # noqa: E731
        c.name(keys["size"]) for c in candidates(SequenceParallel(mode="auto", **keys), 65536)
    ]
    assert names(size=4, heads=28, kv_heads=4) == ["zigzag-ring", "llama3", "usp 2 x 2", "ulysses"]
    assert names(size=4, heads=6, kv_heads=3) == ["zigzag-ring", "llama3", "usp 2 x 2"]
    assert names(size=4, heads=7, kv_heads=7) == ["zigzag-ring", "llama3"]
    long = candidates(SequenceParallel(size=4, mode="auto", heads=28, kv_heads=4), 2**20)
    assert Candidate(1, "gather") not in long, "keys of the whole row would take 6 GiB"
