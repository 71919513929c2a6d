"""The budget as a table, and what to change when memory runs out: text for people."""

from __future__ import annotations

import dataclasses

from longfactory.memory.budget import MARGIN, Budget, budget
from longfactory.memory.seconds import roofline
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob
from longfactory.memory.technique import techniques

GiB = 2**30


def describe(settings: MemorySettings) -> str:
    """One line: what is done, in the words of the configuration."""
    return "; ".join(
        filter(None, (each.words(settings) for each in techniques() if each.words is not None))
    )


def table(job: TrainingJob, settings: MemorySettings, b: Budget, ok: bool, mode: str) -> str:
    """The budget, a line an item, in GiB."""
    m, s = job.machine, job.shape
    lines = [
        (
            f"Memory plan (memory: {mode}): {s.parameters / 1e9:.2f} B parameters "
            f"({s.trainable / 1e9:.2f} B trained), rows of {job.tokens:,} tokens, "
            f"{job.local:,} per GPU (sequence_parallel_size {job.sp}), {m.gpus} "
            f"GPU{'s' if m.gpus > 1 else ''} in total"
        ),
        f"  {'; '.join(filter(None, (describe(settings), _masters(job))))}",
        f"  {'peak memory of one GPU':<44}{'GiB':>8}",
    ]
    lines += [f"    {name:<42}{value / GiB:>8.1f}" for name, value in b.gpu.items() if value > 0]
    lines.append(
        f"    {'total':<42}{b.gpu_total / GiB:>8.1f}   of {m.gpu_bytes / GiB:.1f}; the plan "
        f"may use {MARGIN:.0%}"
    )
    if b.host:
        host = f"host memory for {m.on_host} GPU{'s' if m.on_host > 1 else ''}"
        lines.append(f"  {host:<44}{'GiB':>8}")
        lines += [f"    {name:<42}{value / GiB:>8.1f}" for name, value in b.host.items()]
        lines.append(f"    {'total':<42}{b.host_total / GiB:>8.1f}   of {m.host_bytes / GiB:.1f}")
    rate = job.local / b.seconds
    seconds = f"{b.seconds:.2f}" if b.seconds < 10 else f"{b.seconds:.1f}"
    lines.append(
        f"  predicted: {seconds} s per row, {rate:,.0f} tokens/s per GPU "
        f"({roofline(job) / b.seconds:.0%} of the roofline)"
    )
    if s.width == 4:
        lines.append("  " + float32_is_slow(job))
    if not ok:
        lines.append("  " + does_not_fit(job, settings, b))
    return "\n".join(lines)


def _masters(job: TrainingJob) -> str | None:
    """How trained weights are held beside those that layers compute with, where they differ."""
    if job.shape.width == 4 or job.shape.adapters or job.zero or job.pure:
        return None
    return "split masters" if job.master == 2 else "fp32 masters"


def float32_is_slow(job: TrainingJob) -> str:
    """What fp32 costs, and what to set."""
    half = dataclasses.replace(job, shape=dataclasses.replace(job.shape, width=2))
    wide, narrow = job.machine.computing(4), job.machine
    times = roofline(job) / roofline(half)
    return (
        f"This run computes in fp32: matrix multiplications at about {wide.gemm / 1e12:.0f} "
        f"TFLOP/s and attention at about {wide.attention_backward / 1e12:.0f}. bf16 would give "
        f"{narrow.gemm / 1e12:.0f} and {narrow.attention_backward / 1e12:.0f} (fp32 takes "
        f"{times:.0f} times as long), with activations of half the size. Set bf16: true."
    )


def does_not_fit(job: TrainingJob, settings: MemorySettings, b: Budget) -> str:
    """Which resource is short and what to change."""
    m = job.machine
    short = []
    if b.gpu_total > MARGIN * m.gpu_bytes:
        short.append(f"{(b.gpu_total - MARGIN * m.gpu_bytes) / GiB:.1f} GiB per GPU")
    if b.host_total > 0.85 * m.host_bytes:
        short.append(f"{(b.host_total - 0.85 * m.host_bytes) / GiB:.1f} GiB of host memory")
    missing = (
        f"It is short of {' and '.join(short)}." if short else "It is at the limit of this machine."
    )
    return f"This does not fit. {missing} {advice(job, settings)}"


def advice(job: TrainingJob, settings: MemorySettings) -> str:
    """What makes room, strongest first, of what is not yet in use."""
    ways = []
    if job.sp < job.machine.gpus:
        ways.append(f"sequence_parallel_size: {2 * job.sp}")
    stated = [each.advice(job, settings) for each in techniques() if each.advice is not None]
    ways += [line for _, line in sorted(way for way in stated if way is not None)]
    shape = job.shape
    if shape.trainable == shape.parameters:
        few = dataclasses.replace(shape, trainable=shape.parameters // 100, adapters=True)
        if _takes_less(job, dataclasses.replace(few, head_trained=False), settings):
            ways.append("finetuning_type: lora")
    elif shape.adapters and not shape.quantized:
        # experts too, where weights are not sharded
        reached = shape.linear_parameters + (0 if job.sharded else shape.routed_parameters)
        four = dataclasses.replace(shape, quantized=reached)
        if job.sharded:  # the hand-written layer steps aside for gathered weights of four bits
            four = dataclasses.replace(four, written_layer=False)
        if _takes_less(job, four, settings):
            ways.append("quantization_bit: 4")
    ways.append("a smaller cutoff_len")
    return "To make room, try: " + ", ".join(ways) + "."


def _takes_less(job: TrainingJob, shape: ModelShape, settings: MemorySettings) -> bool:
    """Whether another shape takes less of the GPU: adapters change what layers store."""
    other = dataclasses.replace(job, shape=shape, master=4)
    return (
        budget(other, settings, timed=False).gpu_total
        < budget(job, settings, timed=False).gpu_total
    )
