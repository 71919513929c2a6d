"""What the schedules of sequence parallelism (`sp.schedules`) cost a layer's attention: bytes on
their way, buffers, and merges of partial outputs.

A ring's messages are hidden behind its tiles; of gathered keys and values the fetch is, and what
goes back is not; heads that are exchanged wait for each other. A merge reads and writes fp32 sums.
Every message takes its latency beside its bytes, which is what binds short rows between hosts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from longfactory.memory.shapes import TrainingJob
from longfactory.sp.schedules.ulysses import copies

MERGE_REACHES = 0.6  # of the rate of a GPU's own memory (fitted: benchmarks/results/auto_choice.md)
EXCHANGES = 4  # of heads in a pass: queries, keys, values and the output, each one all-to-all
MERGE_BYTES = 22  # of a number of the attention output: 10 in forward, 12 of its query in backward


class Schedule(NamedTuple):
    """`ulysses` GPUs exchange heads; among the rest keys and values go round a ring, or are
    gathered.
    """

    ulysses: int
    gathers: bool = False


def schedule(job: TrainingJob) -> Schedule:
    """What the job's mode is on its GPUs and heads. Of `auto`, which measures: the fastest here."""
    size, heads = job.sp, job.shape.heads
    if job.mode == "ulysses":
        return Schedule(math.gcd(size, heads))
    if job.mode == "usp":
        near = math.gcd(size, job.machine.on_host)
        return Schedule(job.ulysses_degree or math.gcd(near, heads))
    return Schedule(1, gathers=job.mode == "llama3")


def schedules(job: TrainingJob) -> list[Schedule]:
    """Those among which `auto` chooses, the others' own alone."""
    if job.mode != "auto":
        return [schedule(job)]
    near = math.gcd(job.sp, job.machine.on_host)
    shared = [u for u in range(2, job.sp + 1) if job.sp % u == near % u == job.shape.heads % u == 0]
    gathered = [Schedule(1, gathers=True)] if _gatherable(job) else []
    return [Schedule(1), *gathered, *map(Schedule, shared)]


def exchanges_heads(job: TrainingJob) -> bool:
    """Whether a schedule of the job may exchange heads."""
    return job.sp > 1 and any(each.ulysses > 1 for each in schedules(job))


def _gatherable(job: TrainingJob) -> bool:
    """As in `sp.schedules.choose`."""
    return 2 * 6 * 128 * job.shape.kv_heads * job.tokens <= 2**30


def attention_seconds(
    job: TrainingJob, attending: float, ring_bytes: float, forward_runs: float
) -> float:
    """Seconds of a step's attention with what sequence parallelism adds to it.

    Args:
        attending: seconds of the kernels.
        ring_bytes: that a GPU receives in a step of a ring over the whole group.
        forward_runs: forward passes of attention in a step.
    """
    if job.sp == 1:
        return attending
    return min(_seconds(job, each, attending, ring_bytes, forward_runs) for each in schedules(job))


def _seconds(
    job: TrainingJob, how: Schedule, attending: float, ring_bytes: float, forward_runs: float
) -> float:
    shape, machine = job.shape, job.machine
    ring = job.sp // how.ulysses
    passes = forward_runs + 1 + 4 / shape.width  # keys, values and their fp32 gradients
    times = copies(shape.heads, shape.kv_heads, how.ulysses) if how.ulysses > 1 else 1
    hidden = ring_bytes / machine.between(job.sp) * times * (ring - 1) / (job.sp - 1)
    waited = 0.0
    layers = sum(count for kind, count in shape.layers_of_kinds if kind.heads)
    if how.gathers:
        waited = hidden * (4 / shape.width) / passes
        hidden -= waited
        # keys and values are fetched at once from all; their gradients go back alike
        fetched = layers * (forward_runs + 1) * machine.waits(job.sp)
        hidden, waited = hidden + fetched, waited + layers * machine.waits(job.sp)
    elif ring > 1:
        # keys and values at each turn, and in backward the sums of their gradients, once more
        turns = (forward_runs + 1) * (ring - 1) + 1
        hidden += layers * turns * machine.waits(job.sp)
    if how.ulysses > 1:
        waited += exchanged_heads(job, how, forward_runs) / machine.between(how.ulysses)
        # queries, keys, values; the output; in backward these again, and their gradients
        exchanges = EXCHANGES * (forward_runs + 2)
        waited += layers * exchanges * machine.waits(how.ulysses)
    merges = min(ring - 1, 1) if how.gathers else ring - 1
    numbers = job.local * sum(count * kind.outputs for kind, count in shape.layers_of_kinds)
    waited += merges * MERGE_BYTES * numbers / (MERGE_REACHES * machine.memory)
    return max(attending, hidden) + waited


def exchanged_heads(job: TrainingJob, how: Schedule, forward_runs: float) -> float:
    """Bytes that a GPU receives in a step's exchanges of heads: queries, keys, values and outputs
    in forward; these, their gradients and the output's in backward.
    """
    shape = job.shape
    times = copies(shape.heads, shape.kv_heads, how.ulysses)
    share = (how.ulysses - 1) / how.ulysses
    numbers = sum(
        count * (kind.queries + kind.outputs + times * kind.keys_values)
        for kind, count in shape.layers_of_kinds
    )
    return job.local * shape.width * share * numbers * (forward_runs + 2)


def held_bytes(job: TrainingJob) -> float:
    """Bytes of the schedule's buffers in one layer's backward, on one GPU: of the schedule that
    holds most, where `auto` is to choose.
    """
    return max(_held_bytes(job, each) for each in schedules(job)) if job.sp > 1 else 0.0


def _held_bytes(job: TrainingJob, how: Schedule) -> float:
    shape = job.shape
    keys = shape.key_bytes
    # keys and values on their way, and the sums of their gradients
    held = 4.0 * keys * job.local if how.ulysses < job.sp else 0.0
    if how.gathers:
        # far keys and values as they come and in order; their fp32 gradients, made and sent
        held = (4 + 4 * 4 / shape.width) * keys * (job.tokens - job.local)
    if how.ulysses > 1:
        # queries, outputs, keys, values and their gradients, by heads
        times = copies(shape.heads, shape.kv_heads, how.ulysses)
        held += (4 * shape.attention_bytes + 4 * keys * times) * job.local
    return held
