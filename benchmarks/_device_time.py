"""Where the time of a step goes on a GPU: kernels by kind, and messages that nothing hides."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Span = tuple[float, float]

ATTENTION = ("flash", "sdpa", "fmha", "cudnn", "attention")
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "matmul", "splitk")
"""Parts of the names of kernels; what is in neither, and no message, counts as the rest."""


class Kernel(NamedTuple):
    """What ran on this GPU, with its times in microseconds."""

    name: str
    start: float
    stop: float


def kernels_of(step: Callable[[], object]) -> list[Kernel]:
    """The kernels and copies of a step on this GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def divided(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Milliseconds of a step on this GPU.

    Returns:
        attention, products, rest: kernels of each kind, their sums. messages: NCCL's kernels (with
        waiting for other ranks). exposed: those of them in which no other kernel runs. idle: in
        which nothing runs, between the first kernel and the last.
    """
    out = dict.fromkeys(("attention", "products", "rest"), 0.0)
    for kernel in kernels:
        if kind(kernel.name) != "messages":
            out[kind(kernel.name)] += (kernel.stop - kernel.start) / 1e3
    sent, busy = sent_and_busy(kernels)
    every = union([*sent, *busy])
    out["messages"] = length(sent) / 1e3
    out["exposed"] = (length(sent) - shared(sent, busy)) / 1e3
    whole = every[-1][1] - every[0][0] if every else 0.0
    out["idle"] = (whole - length(every)) / 1e3
    return out


def exposed_by_operation(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Milliseconds of each of NCCL's operations in which no kernel but NCCL's runs, most first."""
    busy = sent_and_busy(kernels)[1]
    found: dict[str, list[Span]] = {}
    for kernel in kernels:
        if kind(kernel.name) == "messages":
            found.setdefault(operation(kernel.name), []).append((kernel.start, kernel.stop))
    out = {name: union(spans) for name, spans in found.items()}
    exposed = {name: (length(spans) - shared(spans, busy)) / 1e3 for name, spans in out.items()}
    return dict(sorted(exposed.items(), key=lambda each: -each[1]))


def longest(kernels: Sequence[Kernel], of_kind: str, most: int = 6) -> dict[str, float]:
    """Milliseconds of the kernels of a kind that take longest, by name."""
    sums: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        if kind(kernel.name) == of_kind:
            sums[short_name(kernel.name)] += (kernel.stop - kernel.start) / 1e3
    return dict(sums.most_common(most))


def short_name(name: str) -> str:
    """Without namespaces and templates; with the operation of PyTorch's elementwise kernels."""
    plain = re.sub(r"\(anonymous namespace\)::|at::native::|^void ", "", name)
    operation = re.search(r"CUDAFunctor_\w+|\w+_kernel_cuda|BinaryFunctor", plain)
    short = re.split(r"[<(]", plain)[0]
    return f"{short} ({operation[0]})" if operation else short


def sent_and_busy(kernels: Sequence[Kernel]) -> tuple[list[Span], list[Span]]:
    """When NCCL's kernels run, and when others do."""
    found: dict[bool, list[Span]] = {True: [], False: []}
    for kernel in kernels:
        found[kind(kernel.name) == "messages"].append((kernel.start, kernel.stop))
    return union(found[True]), union(found[False])


def operation(name: str) -> str:
    """What a kernel of NCCL does, by its name: "SendRecv", "AllGather", ..."""
    found = re.search(r"nccl(?:Dev)?Kernel_([A-Za-z]+)", name)
    return found[1] if found else name[:40]


def kind(name: str) -> str:
    """Of a kernel by its name."""
    name = name.lower()
    if "nccl" in name:
        return "messages"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "products" if any(part in name for part in PRODUCTS) else "rest"


def union(spans: Sequence[Span]) -> list[Span]:
    """The same times as ascending spans that do not overlap."""
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def length(spans: Sequence[Span]) -> float:
    """Of spans that do not overlap."""
    return sum(stop - start for start, stop in spans)


def shared(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Time that is in both of two unions."""
    total, at = 0.0, 0
    for start, stop in first:
        while at < len(second) and second[at][1] <= start:
            at += 1
        i = at
        while i < len(second) and second[i][0] < stop:
            total += min(stop, second[i][1]) - max(start, second[i][0])
            i += 1
    return total
