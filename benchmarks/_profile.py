"""Where a step's GPU time goes, from a trace that `enable_torch_profiler` has written."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RECORDED = {
    "enable_torch_profiler": "true",
    "profiler_warmup_steps": 1,
    "profiler_active_steps": 1,
    "profiler_with_stack": "false",
    "profiler_record_shapes": "false",
    "profiler_profile_memory": "false",
}
"""Keys of a run of which one step is recorded, without what makes a trace large."""
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
ROWS = 45  # of the list of kernels

PARTS: tuple[tuple[str, str, str], ...] = (
    # (part, what the host's operations are called, what the kernel is called)
    ("images: tower", r"images: tower", r""),
    ("images: exchange", r"images: exchange", r""),
    ("copies and casts", r"FSDP::.*aten::_foreach_copy_", r""),  # for messages
    ("optimizer", r"Optimizer\.step|adamw|clip_grad|_foreach_|aten::linalg_vector_norm", r""),
    ("optimizer", r"", r"^_update$"),  # of split masters: a kernel without an operation of the host
    ("messages", r"", r"nccl"),
    ("attention", r"", r"flash_(fwd|bwd)|fmha|sdpa|cudnn_generated"),
    ("attention", r"_flash_attention|cudnn_attention|_efficient_attention", r""),
    ("experts: products", r"grouped_mm", r""),
    ("products", r"", r"gemm|nvjet|cutlass|xmma|cublas|splitK"),
    ("experts: order", r"_Sent|_Combined|aten::sort|searchsorted|sum_over_picks|weighted_sum", r""),
    ("experts: order", r"", r"sum_over_picks|weighted_sum"),
    ("router", r"topk|Router|TopK|aten::_softmax|bincount|scatter", r""),
    ("copies and casts", r"aten::copy_|aten::_to_copy|aten::cat|aten::clone", r""),
    ("compiled elementwise", r"", r"^triton_"),
    ("elementwise", r"", r""),
)
"""The first that fits; an empty pattern fits everything."""


class Found(NamedTuple):
    """Work on the GPU. Times in microseconds."""

    start: float
    seconds: float
    kernel: str
    operations: tuple[str, ...]  # of the host, the outermost first


def read(trace: Path) -> tuple[list[Found], list[dict[str, Any]]]:
    """What the GPU did, and all complete events."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    chains = _chains(events)
    found = []
    for e in events:
        if e.get("cat") in GPU_WORK:
            chain = chains.get(e.get("args", {}).get("External id"), ())
            found.append(Found(e["ts"], e["dur"], e["name"], chain))
    return found, events


def _chains(events: Iterable[dict[str, Any]]) -> dict[int, tuple[str, ...]]:
    """The names of each operation's ancestors and its own, by its external id."""
    threads: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    for e in events:
        if e.get("cat") in ("cpu_op", "user_annotation"):
            threads[e["tid"]].append(e)
    chains: dict[int, tuple[str, ...]] = {}
    for own in threads.values():
        own.sort(key=lambda e: (e["ts"], -e["dur"]))
        open_: list[tuple[float, str]] = []
        for e in own:
            while open_ and open_[-1][0] <= e["ts"]:
                open_.pop()
            open_.append((e["ts"] + e["dur"], e["name"]))
            number = e.get("args", {}).get("External id")
            if number is not None:
                chains[number] = tuple(name for _, name in open_)
    return chains


def part_of(work: Found) -> str:
    names = " ".join(work.operations)
    return next(
        part
        for part, operation, kernel in PARTS
        if re.search(operation, names) and re.search(kernel, work.kernel)
    )


def phase_of(work: Found) -> str:
    names = " ".join(work.operations)
    if part_of(work) == "optimizer":
        return "optimizer"
    return "backward" if "evaluate_function" in names or "Backward" in names else "forward"


def busy(found: Iterable[Found]) -> float:
    """Microseconds in which anything ran: work on several streams may overlap."""
    total, end = 0.0, float("-inf")
    for work in sorted(found):
        stop = work.start + work.seconds
        total += max(0.0, stop - max(end, work.start))
        end = max(end, stop)
    return total


def print_traces(name: str, folder: Path) -> None:
    """Where the recorded step of a run spent its time, on each GPU."""
    for trace in sorted(folder.glob("trace_rank*.json")):
        rank = trace.stem.split("_")[1].removeprefix("rank")
        print(f"\n{name}, one step on GPU {rank}:\n{table(trace)}\n", flush=True)


def table(trace: Path) -> str:
    """By part and phase, then the kernels that take longest, in milliseconds of one step."""
    found, events = read(trace)
    if not found:
        return "The trace has no work of a GPU."
    steps = [e for e in events if e.get("cat") == "user_annotation" and "ProfilerStep" in e["name"]]
    span = max(w.start + w.seconds for w in found) - min(w.start for w in found)
    host = sum(e["dur"] for e in steps)
    waits: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for e in events:
        if e.get("cat") in ("cuda_runtime", "cuda_driver"):
            calls[e["name"]] += e["dur"] / 1e3
            if e["name"].startswith(WAITS):
                waits[e["name"]] += 1
    syncs = ", ".join(f"{count} {name}" for name, count in waits.most_common())
    longest = ", ".join(f"{name} {ms:.1f}" for name, ms in calls.most_common(6))
    lines = [
        f"GPU busy {busy(found) / 1e3:.1f} ms of {span / 1e3:.1f} ms (the host's step"
        f" {host / 1e3:.1f} ms), {len(found):,} kernels and copies; {syncs or 'no waits'}",
        f"The host in calls of CUDA, ms: {longest or 'none'}",
        "",
        "| part | forward, ms | backward, ms | optimizer, ms |",
        "|---|---|---|---|",
    ]
    sums: dict[tuple[str, str], float] = collections.defaultdict(float)
    for w in found:
        sums[part_of(w), phase_of(w)] += w.seconds
    for part in dict.fromkeys(p for p, _, _ in PARTS):
        cells = [sums[part, phase] / 1e3 for phase in ("forward", "backward", "optimizer")]
        if sum(cells):
            lines.append(f"| {part} | " + " | ".join(f"{c:.1f}" for c in cells) + " |")
    rows: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
    for w in found:
        rows[part_of(w), _outer(w), w.operations[-1] if w.operations else "", w.kernel[:90]].append(
            w.seconds
        )
    lines += ["", "| part | in | operation | kernel | times | ms |", "|---|---|---|---|---|---|"]
    for (part, outer, operation, kernel), each in sorted(rows.items(), key=lambda r: -sum(r[1]))[
        :ROWS
    ]:
        cells_ = [part, outer, operation[:40], kernel.replace("|", "/"), str(len(each))]
        lines.append(f"| {' | '.join(cells_)} | {sum(each) / 1e3:.2f} |")
    return "\n".join(lines)


def _outer(work: Found) -> str:
    """The autograd function or the outermost operation that is no step of the profiler."""
    for name in work.operations:
        if "evaluate_function" in name:
            return name.rpartition(": ")[2][:40]
    outside = [n for n in work.operations if not n.startswith(("ProfilerStep", "aten::"))]
    return outside[0][:40] if outside else ""
