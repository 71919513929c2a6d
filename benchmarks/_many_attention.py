"""The part `attention` of `many_gpus.py`: one layer's attention under every schedule."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

import _attention_published as others
import _attention_rows as mixes
import _attention_setting as bench
import published
from _device_time import divided, kernels_of
from _many_table import K, Row, earlier, keep, wanted
from longfactory import sp
from longfactory.sp.layout import dealt
from longfactory.sp.measure import (
    MOST_PASSES,
    PASSES,
    Measure,
    forward_backward,
    repeated,
)
from longfactory.sp.plan import RowPlan
from longfactory.sp.schedules.choose import Candidate, candidates, choice_of
from per_document_zigzag import attention_pairs

SHAPES_OF_HEADS: dict[str, tuple[int, int, int, int]] = {
    "28/4 heads of 128": (28, 4, 128, 128),
    "32/8 heads of 128": (32, 8, 128, 128),
    "16/8 heads of 256": (16, 8, 256, 256),
    "16/16 heads of 192/128": (16, 16, 192, 128),
}
LENGTHS: tuple[tuple[int, str], ...] = (
    (64 * K, "28/4 heads of 128"),
    (128 * K, "28/4 heads of 128"),
    (64 * K, "32/8 heads of 128"),
    (128 * K, "32/8 heads of 128"),
    (1024 * K, "8/4 heads of 128"),
    (32 * K, "28/4 heads of 128"),
    (32 * K, "32/8 heads of 128"),
    (128 * K, "16/8 heads of 256"),
    (128 * K, "16/16 heads of 192/128"),
    (256 * K, "28/4 heads of 128"),
    (512 * K, "28/4 heads of 128"),
)
"""A million tokens have fewer heads: a pass of 28 takes 14 seconds on four GPUs."""
SHAPES_OF_HEADS["8/4 heads of 128"] = (8, 4, 128, 128)
ONE_GPU_AT = 128 * K
"""Longer documents are compared with the kernel's rate at this length: it grows no further."""


def attention(a: argparse.Namespace) -> int:
    """Runs in each process of a group."""
    setting = bench.start(a.smoke)
    rows = earlier(a) if setting.rank == 0 else []
    packed = [(mix, setting.packed_length) for mix in mixes.MIXES]
    smaller = 16 if a.small else 1
    if a.smoke:
        smaller = 256
    if a.small and not a.smoke:
        setting = dataclasses.replace(setting, packed_length=setting.packed_length // 4)
    documents = [
        (f"one document of {length // K}k, {heads}", [length // smaller], heads)
        for length, heads in LENGTHS
    ]
    of_documents = [
        (
            f"{mix}, {length // K}k, 28/4 heads of 128",
            mixes.mixed(setting, mix, length),
            "28/4 heads of 128",
        )
        for mix, length in packed
    ]
    cases = [*documents[:2], *of_documents, *documents[2:]]
    for name, sizes, heads in cases:
        if not wanted(a, name):
            continue
        late = torch.tensor(int(time.time() > a.end))
        late = late.to(setting.device)
        dist.all_reduce(late)
        if int(late):
            row: Row = {"row": name, "error": "not started: the time of this command was up"}
        else:
            row = attempt(functools.partial(attention_row, setting, name, sizes, heads, a.repeats))
            row = {"row": name, **row}
        if setting.rank == 0:
            keep(a, row, rows)
    dist.barrier()
    dist.destroy_process_group()
    return 0


ATTENTION_NOTE = (
    "TFLOP/s for each GPU, forward with backward, on the slowest rank, medians in turn. In brackets:"
    " over one GPU's kernel at the same work (documents above 128k: at 128k); milliseconds of NCCL's"
    " kernels (with waiting for other ranks), and of these what no other kernel hides. `auto` measures"
    " the schedules once and takes the fastest, the rule computes; beside both, their schedule's speed"
    " over the best one's. Published implementations run on FlashAttention 2."
)


def attempt(body: Callable[[], Row]) -> Row:
    """A row, or why there is none."""
    try:
        return body()
    except (RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def attention_row(
    setting: bench.Setting, name: str, sizes: list[int], heads_name: str, repeats: int
) -> Row:
    """One row of tokens under every schedule."""
    heads, kv_heads, dim, value_dim = SHAPES_OF_HEADS[heads_name]
    # one context for all rows: a process group's first message takes a second
    ctx = bench.context(setting, "auto")
    ctx.measured.clear()
    ctx.set_heads(heads, kv_heads)
    unit = sp.alignment(ctx)
    sizes = [*sizes[:-1], sizes[-1] - sum(sizes) % unit]
    segments = mixes.segments_of(sizes)
    length = segments[-1].stop
    slow = length >= 256 * K
    if slow:
        repeats = min(repeats, 3 if length == 256 * K else 1)
    began = time.perf_counter()
    Measure(ctx, dim, value_dim, setting.dtype, setting.device)(length, segments)
    measured_for = time.perf_counter() - began
    names = {c.name(setting.ranks): c for c in candidates(ctx, length)}
    plans = {
        schedule: RowPlan(
            length, tuple(segments), ctx, choice_of(c, setting.ranks, length, segments)
        )
        for schedule, c in names.items()
    }
    if len(sizes) > 1:
        plans[DEALT] = in_chunks(plans["llama3"])
    tensors = inputs(setting, length // setting.ranks, heads_name)
    steps = [functools.partial(forward_backward, plan, *tensors) for plan in plans.values()]
    flop = 3.5 * 2.0 * attention_pairs(sizes) * heads * (dim + value_dim) / setting.ranks / 1e12
    times = dict(zip(plans, in_turn(setting, steps, repeats, flop), strict=True))
    base = one_gpu(setting, sizes, heads_name)
    row: Row = {}
    parts: dict[str, dict[str, float]] = {}
    for (schedule, seconds), step in zip(times.items(), steps, strict=True):
        text = f"{flop / seconds:.0f} ({flop / seconds / base:.2f}"
        if setting.device.type == "cuda":
            parts[schedule] = divided(kernels_of(step))
            message, exposed = (parts[schedule][k] for k in ("messages", "exposed"))
            text += f"; {message:.1f} ms, exposed {exposed:.1f}"
        row[schedule] = text + ")"
    times.pop(DEALT, None)
    taken = taken_by(ctx, names, length, segments)
    by_the_rule = taken_by(dataclasses.replace(ctx, measured={}), names, length, segments)
    best = min(times.values())
    if taken in parts:
        row["auto's ms"] = ", ".join(f"{k} {v:.1f}" for k, v in parts[taken].items())
        row["ms"] = 1e3 * times[taken]
        row["one GPU's ms / n"] = 1e3 * flop / base
    row |= {
        "one GPU": base,
        "auto takes": taken,
        "auto over the best": best / times[taken],
        "measured in s": measured_for,
        "the rule takes": by_the_rule,
        "the rule over the best": best / times[by_the_rule],
    }
    if (heads, dim) == (28, 128) and not slow:
        for peer in others.peers(setting, sizes):
            row[peer.name] = beside(setting, peer, (heads, kv_heads, dim), flop, best)
    return row


def taken_by(
    ctx: sp.SequenceParallel,
    names: Mapping[str, Candidate],
    length: int,
    segments: Sequence[sp.Segment],
) -> str:
    """The schedule that a context takes for a row, by name."""
    choice = sp.plan(length, segments, ctx).choice
    key = (choice.ulysses, choice.exchange)
    return next(name for name, c in names.items() if (c.ulysses, c.exchange) == key)


DEALT = "llama3, chunks dealt by work"


def in_chunks(plan: RowPlan) -> RowPlan:
    """The same plan on the layout that does not know whole documents."""
    other = RowPlan(plan.length, plan.segments, plan.ctx, plan.choice)
    other.ring_layout = dealt(plan.length, plan.ctx.size, plan.segments, 512)
    other.layout = other.ring_layout.split(1)
    return other


def beside(
    setting: bench.Setting, peer: others.Peer, shape: tuple[int, int, int], flop: float, best: float
) -> str:
    """TFLOP/s of a published implementation on the same documents, and the speed of the best
    schedule over it.
    """
    if published.version(peer.package) is None:
        return "not installed"
    theirs = others.theirs(setting)
    tensors = bench.inputs(len(peer.rows), *shape, theirs, seed=setting.rank)
    attention = peer.make()
    step = functools.partial(bench.forward_backward, attention, *tensors)
    (seconds,) = in_turn(theirs, [step], min(2, setting.repeats), flop)
    return f"{flop / seconds:.0f} (ours {seconds / best:.2f}x)"


def in_turn(
    setting: bench.Setting, steps: Sequence[Callable[[], object]], repeats: int, flop: float
) -> list[float]:
    """Seconds of each step. Short ones are timed some at a time, as layers follow each other.

    Args:
        flop: of a step on a GPU, in units of 10^12.
    """
    passes = max(1, min(MOST_PASSES, int(PASSES / (flop / 400)))) if not setting.smoke else 2
    many = [functools.partial(repeated, step, passes) for step in steps]
    return [seconds / passes for seconds in bench.timed_in_turn(setting, many, repeats)]


def inputs(setting: bench.Setting, rows: int, heads_name: str) -> list[torch.Tensor]:
    """q, k, v, dout of so many tokens, random."""
    heads, kv_heads, dim, value_dim = SHAPES_OF_HEADS[heads_name]
    generator = torch.Generator(setting.device).manual_seed(setting.rank)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
    return [
        torch.randn(rows, *shape, device=setting.device, dtype=setting.dtype, generator=generator)
        for shape in shapes
    ]


_BASES: dict[tuple[Any, ...], float] = {}


def one_gpu(setting: bench.Setting, sizes: list[int], heads_name: str) -> float:
    """TFLOP/s of one GPU alone on the same row; of a document of 128k in place of longer ones."""
    if len(sizes) == 1:
        sizes = [min(sizes[0], ONE_GPU_AT)]
    key = (tuple(sizes), heads_name)
    if key not in _BASES:
        heads, _, dim, value_dim = SHAPES_OF_HEADS[heads_name]
        ctx = setting.one
        plan = sp.plan(sum(sizes), mixes.segments_of(sizes), ctx)
        step = functools.partial(forward_backward, plan, *inputs(setting, sum(sizes), heads_name))
        flop = 3.5 * 2.0 * attention_pairs(sizes) * heads * (dim + value_dim) / 1e12
        (seconds,) = in_turn(setting, [step], setting.repeats, flop)
        _BASES[key] = flop / seconds
    return _BASES[key]
