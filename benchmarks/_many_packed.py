"""The part `packed` of `many_gpus.py`: what a packed row loses over several GPUs, and to what.

Each rank's share of a row is timed on one GPU alone, with fetched rows at hand, so that one GPU
tells of any number of ranks: small tiles (all shares together over the row on one GPU), imbalance
(the busiest share over the mean) and launches (the host's time to enqueue the busiest share). With as
many GPUs as ranks the same share with its exchange follows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import _attention_rows as mixes
import _attention_setting as bench
from _device_time import divided, kernels_of
from _many_attention import attempt, inputs
from _many_table import K, Row, earlier, keep, wanted
from longfactory import sp
from longfactory.sp.layout import Layout, balanced, cost, dealt, filled, whole, zigzag
from longfactory.sp.measure import MOST_PASSES, PASSES, forward_backward, repeated
from longfactory.sp.plan import RowPlan
from longfactory.sp.schedules import gather
from longfactory.sp.schedules.choose import Candidate, choice_of
from per_document_zigzag import attention_pairs

HEADS = "28/4 heads of 128"
RANKS = (2, 4, 8)
SEEDS = (1, 2, 3)
GATHER = Candidate(1, "gather")


def packed(a: argparse.Namespace) -> int:
    """Runs in each process of a group."""
    setting = bench.start(a.smoke)
    rows = earlier(a) if setting.rank == 0 else []
    cases = [
        (mix, seed, n)
        for seed in SEEDS
        for mix in reversed(mixes.MIXES)
        for n in (setting.ranks, *RANKS)
        if n > 1
    ]
    for mix, seed, n in dict.fromkeys(cases):
        name = f"{mix}, {setting.packed_length // K}k, row {seed}, {n} ranks"
        if not wanted(a, name):
            continue
        late = torch.tensor(int(time.time() > a.end)).to(setting.device)
        dist.all_reduce(late)
        if int(late):
            row: Row = {"error": "not started: the time of this command was up"}
        else:
            row = attempt(functools.partial(packed_row, setting, mix, seed, n))
        if setting.rank == 0:
            keep(a, {"row": name, **row}, rows)
    dist.barrier()
    dist.destroy_process_group()
    return 0


PACKED_NOTE = (
    "One layer's attention, forward and backward, 28/4 heads of 128, bf16; milliseconds, medians. `one"
    " call / n`: FlashAttention 2's call for all documents on one GPU, over the ranks; `engine / n`: what"
    " LongFactory does with the row on one GPU (long documents one by one on cuDNN), over the ranks;"
    " `sorted / n`: the same with the documents in the order of their lengths, so that short ones are in"
    " one call. `mean` and `busiest`: the ranks' shares, each on a GPU alone. Small tiles: mean over"
    " engine / n; imbalance: busiest over mean. `enqueued`: the host's time for the busiest share (below"
    " the busiest's time launches are hidden). `together`: with as many GPUs as ranks, exchange included."
    " Layouts: ms of the busiest share (what `layout.cost` says, over the mean of perfect balance)."
)


def documents(setting: bench.Setting, mix: str, seed: int) -> list[int]:
    """Lengths of a row's documents; the row divides over all ranks."""
    median, sigma, cap = mixes.MIXES[mix]
    if setting.smoke:
        median, cap = median // 128, cap // 128
    return mixes.documents(setting.packed_length, median, sigma, cap, seed)


def packed_row(setting: bench.Setting, mix: str, seed: int, n: int) -> Row:
    """A row of documents over `n` ranks, taken apart."""
    sizes = documents(setting, mix, seed)
    segments = tuple(mixes.segments_of(sizes))
    length = segments[-1].stop
    one_call, engine, in_order = whole_row(setting, tuple(sizes))
    layouts = options(length, n, segments)
    chosen = next(k for k, v in layouts.items() if v == layouts["chosen"])
    ideal = attention_pairs(sizes) / n
    row: Row = {
        "documents": len(sizes),
        "one call / n": one_call / n,
        "engine / n": engine / n,
        "sorted / n": in_order / n,
    }
    told = []
    for name, layout in layouts.items():
        if name == "chosen":
            continue
        shares = alone(setting, length, segments, layout)
        times = [seconds for seconds, _ in shares]
        predicted = max(cost(layout, segments)) / ideal
        told.append(f"{name} {1e3 * max(times):.2f} ({predicted:.2f})")
        if name == chosen:
            busiest = max(times)
            row |= {
                "mean": 1e3 * statistics.mean(times),
                "busiest": 1e3 * busiest,
                "enqueued": 1e3 * shares[times.index(busiest)][1],
                "small tiles": 1e3 * statistics.mean(times) * n / engine,
                "imbalance": busiest / statistics.mean(times),
            }
    took = row["busiest"]
    if n == setting.ranks:
        plan, parts = together(setting, length, segments)
        took = row["together"] = plan
        row["exchange and waiting"] = took - row["busiest"]
        row["on the device"] = parts
    row |= {
        "of one call": one_call / n / took,
        "of the engine": engine / n / took,
        "layout": chosen,
        "layouts": ", ".join(told),
    }
    return row


def options(length: int, n: int, segments: tuple[sp.Segment, ...]) -> dict[str, Layout]:
    """Layouts by name; "chosen" is what the plan takes."""
    out = {"chunks by work": dealt(length, n, segments, 512), "whole": whole(length, n, segments)}
    for share in (1.5, 1.0, 0.7, 0.5):
        out[f"parts of {share:g}"] = whole(length, n, segments, share)
    for last in (16, 24, 32, 48):
        layout = filled(length, n, segments, last)
        if layout is not None:
            out[f"uncut, {last}"] = layout
    out["zigzag"] = zigzag(length, n)
    out = {
        name: layout
        for i, (name, layout) in enumerate(out.items())
        if layout not in list(out.values())[:i]
    }
    best = balanced(length, n, segments, 512)
    return out | {"chosen": best}


@functools.cache
def _contexts(device_type: str, n: int) -> list[sp.SequenceParallel]:
    return [sp.SequenceParallel(n, r, device_type=device_type, mode="llama3") for r in range(n)]


_WHOLE: dict[tuple[int, ...], tuple[float, float, float]] = {}


def whole_row(setting: bench.Setting, sizes: tuple[int, ...]) -> tuple[float, float, float]:
    """Milliseconds of the whole row on one GPU: one call for all documents, what the engine does,
    and that with the documents in the order of their lengths.
    """
    if sizes not in _WHOLE:
        heads, kv_heads = 28, 4
        kernel = mixes.varlen_kernel(setting, (heads, kv_heads))
        call = sp.SequenceParallel(device_type=setting.device.type, backend=kernel)
        tensors = inputs(setting, sum(sizes), HEADS)
        ordered = sorted(sizes, reverse=True)
        plans = [
            sp.plan(sum(sizes), mixes.segments_of(list(some)), ctx)
            for some, ctx in ((sizes, call), (sizes, setting.one), (ordered, setting.one))
        ]
        steps = [functools.partial(forward_backward, plan, *tensors) for plan in plans]
        found = [statistics.median(x) for x in timed(setting, steps)]
        _WHOLE[sizes] = tuple(1e3 * slowest(setting, x) for x in found)  # type: ignore[assignment]
    return _WHOLE[sizes]


def slowest(setting: bench.Setting, seconds: float) -> float:
    """Of all processes."""
    found = torch.tensor(seconds, dtype=torch.float64, device=setting.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def alone(
    setting: bench.Setting, length: int, segments: tuple[sp.Segment, ...], layout: Layout
) -> list[tuple[float, float]]:
    """(seconds, seconds of the host until all is enqueued) of each rank's share. Processes take
    shares in turn.
    """
    n = layout.ranks
    mine = list(range(setting.rank % n, n, setting.ranks)) or [0]
    tensors = inputs(setting, length // n, HEADS)
    steps = []
    for r in mine:
        ctx = _contexts(setting.device.type, n)[r]
        plan = on_layout(
            RowPlan(length, segments, ctx, choice_of(GATHER, n, length, segments)), layout
        )
        steps.append(functools.partial(forward_backward, plan, *tensors))
    with at_hand():
        times = [statistics.median(x) for x in timed(setting, steps)]
        enqueued = [enqueue(setting, step) for step in steps]
        if n == RANKS[-1] and setting.rank == 0:
            print(f"host: {host_time(setting, steps[0])}", flush=True)
    found: list[Any] = [None] * setting.ranks
    dist.all_gather_object(found, list(zip(mine, times, enqueued, strict=True)))
    by_rank = {r: (t, e) for each in found for r, t, e in each}
    return [by_rank[r] for r in range(n)]


def host_time(setting: bench.Setting, step: Callable[[], object]) -> str:
    """The operators on which the host spends most time in a step."""
    bench.synchronize(setting)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    bench.synchronize(setting)
    most = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:8]
    return ", ".join(f"{e.key} {e.self_cpu_time_total / 1e3:.2f} ms ({e.count})" for e in most)


def on_layout(plan: RowPlan, layout: Layout) -> RowPlan:
    """A fresh plan moved to another layout."""
    plan.ring_layout = layout
    plan.layout = layout.split(1)
    return plan


def timed(
    setting: bench.Setting, steps: Sequence[Callable[[], object]], repeats: int = 3
) -> list[list[float]]:
    """Seconds of each step on this GPU, in turn. Short ones are timed some at a time, as layers
    follow each other.
    """
    for step in steps:
        step()
    bench.synchronize(setting)
    began = time.perf_counter()
    steps[0]()
    bench.synchronize(setting)
    passes = max(1, min(MOST_PASSES, int(PASSES / (time.perf_counter() - began))))
    many = [functools.partial(repeated, step, passes) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, found in zip(many, times, strict=True):
            bench.synchronize(setting)
            began = time.perf_counter()
            step()
            bench.synchronize(setting)
            found.append((time.perf_counter() - began) / passes)
    return times


def enqueue(setting: bench.Setting, step: Callable[[], object]) -> float:
    """Seconds of the host until a step's kernels are enqueued: the least of three."""
    found = []
    for _ in range(3):
        bench.synchronize(setting)
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    bench.synchronize(setting)
    return min(found)


def together(
    setting: bench.Setting, length: int, segments: tuple[sp.Segment, ...]
) -> tuple[float, str]:
    """Milliseconds of the row over all GPUs with its exchange, and what the first GPU does then."""
    ctx = bench.context(setting, "llama3")
    ctx.set_heads(28, 4)
    plan = sp.plan(length, segments, ctx)
    step = functools.partial(forward_backward, plan, *inputs(setting, plan.local_length, HEADS))
    passes = 1 if setting.smoke else MOST_PASSES
    (seconds,) = bench.timed_in_turn(setting, [functools.partial(repeated, step, passes)], 3)
    parts = ""
    if setting.device.type == "cuda":
        dist.barrier()
        parts = ", ".join(f"{k} {v:.2f}" for k, v in divided(kernels_of(step)).items())
    return 1e3 * seconds / passes, parts


class AtHand(gather.Fetch):
    """Needed rows that are here already; their gradients go nowhere."""

    def __init__(self, k: Tensor, v: Tensor, call: Any) -> None:
        self.k, self.v = k, v
        self.halo = call.mask.halo
        self.posted = self.halo.anyone

    def wait(self) -> tuple[Tensor, Tensor]:
        rows = len(self.halo.order)
        wanted_rows = torch.arange(rows, device=self.k.device) % len(self.k)
        return self.k[wanted_rows], self.v[wanted_rows]

    def give_back(self, dk: Tensor, dv: Tensor) -> Callable[[], list[gather.Rows]]:
        return list


@contextlib.contextmanager
def at_hand() -> Iterator[None]:
    original = gather.Fetch
    gather.Fetch = AtHand  # type: ignore[misc]
    try:
        yield
    finally:
        gather.Fetch = original  # type: ignore[misc]
