from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from _attention_rows import MIXES, documents
from longfactory import sp
from longfactory.sp import Segment, SequenceParallel
from longfactory.sp.context import over_machines
from longfactory.sp.schedules.choose import Candidate
from longfactory.testing import run_ranks


def ranks(size: int, mode: str, **kwargs: object) -> list[SequenceParallel]:
    return [SequenceParallel(size=size, rank=r, mode=mode, **kwargs) for r in range(size)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(0, 4)], "Segments end at 4, the row at 8"),
        ([Segment(0, 4), Segment(5, 8)], "Segment 1 is"),
        ([Segment(0, 5), Segment(4, 8)], "Segment 1 is"),
        ([Segment(0, 4, 0), Segment(4, 8)], "a parent comes before"),
    ],
)
def test_segments_that_do_not_cover_the_row_are_refused(
    segments: list[Segment], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sp.plan(8, segments, SequenceParallel())


def test_a_length_that_is_not_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sp.alignment\(ctx\) = 8"):
        sp.plan(12, None, SequenceParallel(size=4))


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Unknown attention_backend 'fast'"):
        SequenceParallel.create(1, backend="fast")


def test_alignment() -> None:
    assert sp.alignment(SequenceParallel()) == 1
    assert sp.alignment(SequenceParallel(size=4)) == 8
    assert sp.alignment(SequenceParallel(size=4, device_type="cuda")) == 1024


@pytest.mark.parametrize("mode", ["llama3", "zigzag-ring"])
@pytest.mark.parametrize("window", [None, 6])
def test_what_one_rank_sends_another_expects(mode: str, window: int | None) -> None:
    segments = [Segment(0, 17), Segment(17, 20, 0), Segment(20, 44), Segment(44, 64)]
    plans = [sp.plan(64, segments, ctx) for ctx in ranks(4, mode)]
    halos = [p.mask(window).halo for p in plans]
    for source in range(4):
        for to in range(4):
            assert halos[source].send_counts[to] == halos[to].receive_counts[source]
    # Simulated exchange: every rank ends with its rows in natural order.
    for to in range(4):
        received = []
        for source in range(4):
            at = sum(halos[source].send_counts[:to])
            received.append(
                plans[source].index[
                    halos[source].send_index[at : at + halos[source].send_counts[to]]
                ]
            )
        rows = torch.cat(received)[halos[to].order]
        assert rows.tolist() == [t for a, b in halos[to].fetched for t in range(a, b)]


def test_choice_of_schedule() -> None:
    one, packed = [Segment(0, 512)], [Segment(0, 300), Segment(300, 310), Segment(310, 512)]
    ctx = SequenceParallel(size=4, mode="llama3")
    assert sp.plan(512, one, ctx).choice.layout == "zigzag"
    assert sp.plan(512, packed, ctx).choice.layout == "balanced"
    usp = SequenceParallel(size=8, mode="usp")
    usp.set_heads(28, 4)
    assert sp.plan(512, one, usp).choice.ulysses == 4
    with pytest.raises(ValueError, match="head count"):
        sp.plan(512, one, SequenceParallel(size=8, mode="usp"))


def test_ulysses_gives_the_ring_what_its_heads_do_not_divide(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for heads, degree in ((8, 4), (6, 2), (7, 1)):
        ctx = SequenceParallel(size=4, mode="ulysses", heads=heads, kv_heads=1)
        for _ in range(2):
            assert sp.plan(64, None, ctx).choice[:2] == (degree, "ring")
    assert [r.getMessage() for r in caplog.records] == [
        (
            "sequence parallelism: ulysses: 4 ranks cannot share 6 query heads evenly, so ulysses 2"
            " x ring 2"
        ),
        "sequence parallelism: ulysses: 4 ranks cannot share 7 query heads evenly, so a ring of 4",
    ], "one line each"


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "length", "documents", "node", "expected"),
    [
        (8, 28, 4, 65536, 1, 8, (1, "gather")),  # two merges in place of seven
        (4, 32, 8, 65536, 1, 4, (4, "ring")),  # a ring of four would have small tiles
        (4, 28, 4, 65536, 1, 4, (4, "ring")),
        (4, 28, 4, 131072, 1, 4, (1, "gather")),
        (8, 28, 4, 1048576, 1, 8, (1, "ring")),  # keys of the whole row would take 6 GiB
        (2, 28, 4, 65536, 1, 2, (1, "ring")),  # one merge either way
        # short, as many key heads as query heads: ulysses sends least
        (8, 32, 32, 2048, 1, 8, (8, "ring")),
        (8, 28, 4, 2048, 1, 8, (1, "gather")),  # 28 heads do not divide by 8
        (4, 28, 4, 131072, 11, 4, (4, "ring")),  # long documents stay whole by heads
        (2, 28, 4, 131072, 11, 2, (2, "ring")),
        # short ones: the exchange would take longer than they do
        (4, 28, 4, 131072, 77, 4, (1, "gather")),
        (2, 28, 4, 131072, 77, 2, (1, "gather")),
        (8, 28, 4, 65536, 3, 8, (1, "gather")),
        (16, 32, 8, 65536, 1, 8, (8, "ring")),  # two nodes
        (16, 28, 4, 65536, 3, 8, (1, "gather")),
        # groups begin in the middle of nodes: two neighbours share one for sure
        (6, 28, 4, 65544, 1, 4, (2, "ring")),
        (2, 28, 4, 65536, 3, 1, (1, "gather")),  # one process a node
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    heads: int,
    kv_heads: int,
    length: int,
    documents: int,
    node: int,
    expected: tuple[int, str],
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    edges = [length * i // documents for i in range(documents + 1)]
    segments = [Segment(a, b) for a, b in itertools.pairwise(edges)]
    ctx = SequenceParallel(size=size, mode="auto", heads=heads, kv_heads=kv_heads)
    choice = sp.plan(length, segments, ctx).choice
    assert (choice.ulysses, choice.exchange) == expected, choice.reason
    assert ctx.said == {choice.reason}


def test_auto_knows_the_links() -> None:
    """4096 local tokens of heads without groups: 2 * 2000 FLOP a byte are done while a key travels,
    2 * 2100 are not.
    """
    for flop_per_byte, ulysses in ((2000.0, 1), (2100.0, 3)):
        ctx = SequenceParallel(
            size=3, mode="auto", heads=33, kv_heads=33, flop_per_byte=flop_per_byte
        )
        assert sp.plan(12288, None, ctx).choice.ulysses == ulysses


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def measured_speeds() -> dict[tuple[int, str], dict[str, float]]:
    """TFLOP/s of each schedule on H200s, by the number of ranks and the name of the row."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in json.loads((RESULTS / "auto_choice.json").read_text())["rows"]:
        speeds = {k: v for k, v in row.items() if isinstance(v, float) and "auto" not in k}
        speeds.pop("seconds of measuring")
        found[4, row["row"].removeprefix("one document, ")] = speeds
    for row in json.loads((RESULTS / "attention.json").read_text())["rows"]:
        schedule, _, what = row["row"].partition(", ")
        if schedule in ("zigzag-ring", "ulysses", "llama3") and "both" in row:
            name = ", ".join(reversed(what.split(", "))) if "heads" in what else what
            found.setdefault((2, name), {})[schedule] = row["both"]
    return found


@pytest.mark.parametrize(("ranks", "name"), measured_speeds())
def test_the_rule_is_within_3_percent_of_the_fastest_schedule(ranks: int, name: str) -> None:
    heads, kv_heads = (32, 8) if "32/8" in name else (28, 4)
    length = 65536 if "64k" in name else 131072
    mix = next((m for m in MIXES if m in name), None)
    sizes = [length] if mix is None else documents(length, *MIXES[mix], seed=1)
    edges = [0, *itertools.accumulate(sizes)]
    segments = [Segment(a, b) for a, b in itertools.pairwise(edges)]
    ctx = SequenceParallel(size=ranks, mode="auto", heads=heads, kv_heads=kv_heads)
    choice = sp.plan(length, segments, ctx).choice
    taken = Candidate(choice.ulysses, choice.exchange).name(ranks)
    speeds = measured_speeds()[ranks, name]
    assert speeds[taken] >= 0.97 * max(speeds.values()), speeds


@pytest.mark.parametrize(
    ("size", "ulysses", "environment", "found"),
    [
        (8, 8, {}, []),  # the launcher does not say
        (8, 8, {"LOCAL_WORLD_SIZE": "8"}, []),
        (4, 4, {"LOCAL_WORLD_SIZE": "8"}, []),
        (16, 1, {"LOCAL_WORLD_SIZE": "8"}, []),
        (16, 8, {"LOCAL_WORLD_SIZE": "8"}, []),
        (16, None, {"LOCAL_WORLD_SIZE": "8"}, []),
        (16, 16, {"LOCAL_WORLD_SIZE": "8"}, ["usp with sequence_parallel_ulysses_degree: 8"]),
        # deepspeed
        (16, 16, {"LOCAL_SIZE": "8"}, ["usp with sequence_parallel_ulysses_degree: 8"]),
        (2, 2, {"LOCAL_WORLD_SIZE": "1"}, ["sequence_parallel_mode: zigzag-ring"]),
        (6, 1, {"LOCAL_WORLD_SIZE": "8"}, ["Use a divisor or a multiple of 8"]),
        (
            12,
            12,
            {"LOCAL_WORLD_SIZE": "8"},
            ["Use a divisor or a multiple of 8", "usp with sequence_parallel_ulysses_degree: 4"],
        ),
        (16, 1, {"LOCAL_WORLD_SIZE": "8", "NCCL_IB_DISABLE": "1"}, ["NCCL_IB_DISABLE=1"]),
        (8, 1, {"LOCAL_WORLD_SIZE": "8", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}, []),
    ],
)
def test_slow_groups_are_told(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    ulysses: int | None,
    environment: dict[str, str],
    found: list[str],
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    warnings = over_machines(size, ulysses, "cuda")
    assert len(warnings) == len(found)
    for part, warning in zip(found, warnings, strict=True):
        assert part in warning


@pytest.mark.parametrize("interfaces", ["lo", "=lo"])
def test_a_group_over_machines_needs_a_network(
    monkeypatch: pytest.MonkeyPatch, interfaces: str
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", interfaces)
    assert over_machines(8, 8, "cuda") == [] and over_machines(16, 1, "cpu") == []
    with pytest.raises(ValueError, match="reaches no other machine"):
        over_machines(16, 1, "cuda")


def two_machines(mode: str, **environment: str) -> tuple[int, str]:
    """The ulysses degree of a row over all ranks, and what the log said; or 0 and the refusal."""
    size = dist.get_world_size()
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(size // 2), **environment),
        mock.patch.object(logging.getLogger("longfactory.sp.context"), "warning") as warning,
    ):
        try:
            ctx = SequenceParallel.create(size, mode, heads=8)  # type: ignore[arg-type]
        except ValueError as error:
            return 0, str(error)
        return sp.plan(64, None, ctx).choice.ulysses, "".join(
            call.args[0] for call in warning.call_args_list
        )


@pytest.mark.processes
def test_groups_over_two_machines() -> None:
    for answer in run_ranks(4, two_machines, "usp", GLOO_SOCKET_IFNAME="lo"):
        assert answer[0] == 0 and "reaches no other machine" in answer[1]
    answers = run_ranks(4, two_machines, "ulysses")
    assert [a[0] for a in answers] == [4] * 4
    assert "usp with sequence_parallel_ulysses_degree: 2" in answers[0][1] and not any(
        a[1] for a in answers[1:]
    ), "told once"
    assert run_ranks(4, two_machines, "usp") == [(2, "")] * 4, "heads stay inside a machine"


def test_ring_gives_way_where_little_is_needed() -> None:
    for ctx in ranks(4, "zigzag-ring"):
        plan = sp.plan(64, None, ctx)
        assert not plan.mask().fetch_is_smaller, "the last chunk needs all that the ring brings"
        assert plan.mask(window=5).fetch_is_smaller


def test_masks_are_made_once() -> None:
    plan = sp.plan(16, None, SequenceParallel())
    assert plan.mask(4) is plan.mask(4)
    assert plan.mask(16) is plan.mask(None), "a window as wide as the row is none"


def create(size: int, mode: str, ulysses: int | None, ring: int | None) -> tuple[int, ...] | str:
    try:
        ctx = SequenceParallel.create(size, mode, ulysses, ring)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return (ctx.rank, ctx.size, ctx.dp_rank, ctx.dp_size, ctx.group is None, ctx.dp_group is None)


@pytest.mark.processes
def test_groups_are_consecutive_ranks() -> None:
    assert run_ranks(4, create, 2, "zigzag-ring", None, None) == [
        (0, 2, 0, 2, False, False),
        (1, 2, 0, 2, False, False),
        (0, 2, 1, 2, False, False),
        (1, 2, 1, 2, False, False),
    ]
    assert run_ranks(4, create, 1, "zigzag-ring", None, None)[3] == (0, 1, 3, 4, True, False)
    assert run_ranks(4, create, 4, "usp", 2, None)[3] == (3, 4, 0, 1, False, True)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("size", "mode", "ulysses", "ring", "message"),
    [
        (3, "zigzag-ring", None, None, "sequence_parallel_size 3 does not divide the 4 processes"),
        (4, "striped", None, None, "Unknown sequence-parallel mode 'striped'"),
        (4, "usp", 3, None, "ulysses degree 3"),
        (4, "usp", 2, 4, "is not sequence_parallel_size 4"),
        (4, "usp", None, 3, "ring degree of 3"),
        (4, "ulysses", 2, None, "Use sequence_parallel_mode: usp"),
        (4, "zigzag-ring", None, 2, "Use sequence_parallel_mode: usp"),
    ],
)
def test_impossible_groups_are_refused(
    size: int, mode: str, ulysses: int | None, ring: int | None, message: str
) -> None:
    for answer in run_ranks(4, create, size, mode, ulysses, ring):
        assert message in answer
