"""Where the time of a step goes on a GPU: kernels by kind, and messages that nothing hides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Span = tuple[float, float]

ATTENTION = ("flash", "sdpa", "fmha", "cudnn", "attention")
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "matmul", "splitk")
"""Parts of the names of kernels; what is in neither, and no message, counts as the rest."""


def divided(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step on this GPU.

    Returns:
        attention, products, rest: kernels of each kind, their sums. messages: NCCL's kernels (with
        waiting for other ranks). exposed: those of them in which no other kernel runs. idle: in
        which nothing runs, between the first kernel and the last.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found: dict[str, list[Span]] = {"attention": [], "products": [], "rest": [], "messages": []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            found[kind(event.name)].append(span)
    sent = union(found["messages"])
    busy = union([s for name, spans in found.items() if name != "messages" for s in spans])
    every = union([*sent, *busy])
    out = {
        name: sum(b - a for a, b in spans) / 1e3
        for name, spans in found.items()
        if name != "messages"
    }
    out["messages"] = sum(b - a for a, b in sent) / 1e3
    out["exposed"] = out["messages"] - shared(sent, busy) / 1e3
    whole = every[-1][1] - every[0][0] if every else 0.0
    out["idle"] = (whole - sum(b - a for a, b in every)) / 1e3
    return out


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
