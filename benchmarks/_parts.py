"""Where the GPU's time of a training step goes, from a trace of `enable_torch_profiler`.

Every kernel counts for the module in whose forward it was launched; in the backward pass, for the
module of the forward operation that its autograd node belongs to. `again` is what is computed a
second time there. With traces of a CPU (`--smoke`) operations stand for kernels.
"""

from __future__ import annotations

import bisect
import collections
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

NODE = "autograd::engine::evaluate_function: "
MODULE = "nn.Module: "
KINDS = {
    "recurrence": (
        "chunk_lower", "chunk_invert", "chunk_merge", "chunk_solve", "chunk_scan",
        "chunk_outputs", "chunk_output_gradients", "chunk_reverse", "chunk_value_gradients",
        "chunk_key_gradients", "channel_sums", "channel_products", "channel_squares",
        "channel_gradients", "channel_decays", "_unit", "_unit_gradients",
    ),
    "convolution": ("_forward", "_slopes", "_inputs"),
}  # fmt: skip
"""Whole names of kernels."""
PARTS = {
    "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "mm"),
    "attention": ("flash", "fmha", "cudnn", "sdpa"),
    "optimizer": ("multi_tensor", "adam"),
    "message": ("nccl",),
    "copy": ("memcpy", "memset", "copy"),
    "sum": ("reduce", "norm"),
    "elementwise": ("elementwise", "vectorized"),
}
"""Parts of names, the first that fits."""


class Item(NamedTuple):
    """A kernel: its name, when it was launched and on which thread, its milliseconds, and when it
    began on the device.
    """

    name: str
    at: float
    thread: Any
    ms: float
    began: float = 0.0


class Range(NamedTuple):
    start: float
    stop: float
    name: str
    sequence: int


def kind_of(kernel: str) -> str:
    for kind, names in KINDS.items():
        if kernel in names:
            return kind
    if kernel.startswith("triton_"):  # by torch.compile; its names tell all that is in it
        return "compiled"
    low = kernel.lower()
    for kind, names in PARTS.items():
        if any(name in low for name in names):
            return kind
    return "other"


def read(path: Path) -> tuple[list[Item], dict[Any, list[Range]], float]:
    """Kernels, ranges of each thread, and milliseconds in which the device was busy."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    ranges: dict[Any, list[Range]] = collections.defaultdict(list)
    launches: dict[int, tuple[float, Any]] = {}
    kernels, leaves = [], []
    for e in events:
        category, args = e.get("cat", ""), e.get("args", {})
        if category in ("cpu_op", "python_function"):
            number = int(args.get("Sequence number", -1))
            name = e["name"]
            ranges[e["tid"]].append(Range(e["ts"], e["ts"] + e["dur"], name, number))
            if category == "cpu_op":
                leaves.append(e)
        elif category in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launches[args["correlation"]] = e["ts"], e["tid"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(e)
    for found in ranges.values():
        found.sort(key=lambda r: (r.start, -r.stop))
    items = [
        Item(e["name"], *launches[e["args"]["correlation"]], e["dur"] / 1e3, e["ts"])
        for e in kernels
        if e.get("args", {}).get("correlation") in launches
    ]
    if not kernels:
        starts = {tid: [r.start for r in found] for tid, found in ranges.items()}
        for e in leaves:
            at = bisect.bisect_right(starts[e["tid"]], e["ts"])
            later = ranges[e["tid"]][at : at + 1]
            if not later or later[0].start >= e["ts"] + e["dur"]:
                items.append(Item(e["name"], e["ts"] + e["dur"] / 2, e["tid"], e["dur"] / 1e3))
    busy, end = 0.0, 0.0
    for e in sorted(kernels, key=lambda e: e["ts"]):
        stop = e["ts"] + e["dur"]
        busy += max(0.0, stop - max(end, e["ts"]))
        end = max(end, stop)
    return items, ranges, busy / 1e3


def module_of(stack: list[Range]) -> str | None:
    """The innermost module that is more than one linear map."""
    for r in reversed(stack):
        if r.name.startswith(MODULE):
            name = r.name[len(MODULE) :].rsplit("_", 1)[0]
            if name not in ("Linear", "Conv1d", "SiLUActivation", "Identity"):
                return name
        if r.name.startswith(NODE):
            return None
    return None


def placed(items: list[Item], ranges: dict[Any, list[Range]]) -> list[tuple[Item, str, str, str]]:
    """(kernel, module, phase, operation) of every kernel."""
    forwards: dict[int, list[tuple[float, str]]] = collections.defaultdict(list)
    stacks: list[tuple[Item, list[Range]]] = []
    of_thread: dict[Any, list[Item]] = collections.defaultdict(list)
    for item in items:
        of_thread[item.thread].append(item)
    for thread, found in ranges.items():
        stack: list[Range] = []
        waiting = collections.deque(sorted(of_thread[thread], key=lambda i: i.at))
        for r in [*found, Range(float("inf"), float("inf"), "", -1)]:
            while waiting and waiting[0].at < r.start:
                item = waiting.popleft()
                stacks.append((item, [s for s in stack if s.stop >= item.at]))
            while stack and stack[-1].stop <= r.start:
                stack.pop()
            if r.sequence >= 0 and not r.name.startswith(NODE):
                module = module_of(stack)
                if module:
                    forwards[r.sequence].append((r.start, module))
            stack.append(r)
    for known in forwards.values():
        known.sort()
    rows = []
    for item, stack in stacks:
        nodes = [r for r in stack if r.name.startswith(NODE)]
        module, operation = module_of(stack), ""
        for r in reversed(stack):
            if r.name.startswith("aten::") or r.name.endswith("Backward") or "Function" in r.name:
                operation = r.name.removeprefix("aten::")
                break
        phase = "forward" if not nodes else "again"
        if module is None and nodes:
            phase = "backward"
            earlier = [m for at, m in forwards.get(nodes[-1].sequence, []) if at < nodes[-1].start]
            module = earlier[-1] if earlier else nodes[-1].name[len(NODE) :]
        rows.append((item, module or "outside the model", phase, operation))
    return rows


def waits(rows: list[tuple[Item, str, str, str]], most: int = 16) -> list[str]:
    """Where the device waits between two kernels, and how long after the end of the first one the
    host launched the second.
    """
    found, total, end, before = [], 0.0, None, ""
    for item, module, phase, operation in sorted(rows, key=lambda row: row[0].began):
        if end is not None and item.began > end:
            idle = (item.began - end) / 1e3
            total += idle
            late = (item.at - end) / 1e3
            name = f"{module}, {phase}, {operation[:28]}, {item.name[:40]}"
            found.append((idle, late, before, name))
        stop = item.began + 1e3 * item.ms
        if end is None or stop > end:
            end, before = stop, item.name[:40]
    found.sort(reverse=True)
    lines = [f"the device waits {total:.1f} ms between kernels; the longest: ms, launched ms late"]
    lines += [f"  {idle:8.2f} {late:8.2f}  {a} -> {b}" for idle, late, a, b in found[:most]]
    return lines


def table(path: Path, most: int = 24) -> str:
    """Four tables: by phase and kind, by module, the single kernels that take longest, and where
    the device waits longest.
    """
    items, ranges, busy = read(path)
    rows = placed(items, ranges)
    total = sum(item.ms for item in items) or 1.0
    lines = [f"kernels {total:.1f} ms in all, the device busy for {busy:.1f} ms"]
    kinds: collections.Counter[tuple[str, str]] = collections.Counter()
    modules: collections.Counter[tuple[str, str, str]] = collections.Counter()
    single: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
    calls: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
    for item, module, phase, operation in rows:
        kind = kind_of(item.name)
        kinds[kind, phase] += item.ms
        modules[module, phase, kind] += item.ms
        single[module, phase, operation[:28], item.name[:64]] += item.ms
        calls[module, phase, operation[:28], item.name[:64]] += 1
    phases = ("forward", "again", "backward")
    lines.append(f"{'kind':13}" + "".join(f"{phase:>10}" for phase in phases) + "   share")
    for kind in sorted({k for k, _ in kinds}, key=lambda k: -sum(kinds[k, p] for p in phases)):
        mine = [kinds[kind, phase] for phase in phases]
        share = f"{100 * sum(mine) / total:8.1f}%"
        lines.append(f"{kind:13}" + "".join(f"{ms:10.1f}" for ms in mine) + share)
    lines.append("module, phase, kind: ms")
    for (module, phase, kind), ms in modules.most_common(most):
        lines.append(f"  {ms:8.1f}  {module}, {phase}, {kind}")
    lines.append("single kernels: ms, calls, module, phase, operation, kernel")
    for key, ms in single.most_common(most):
        lines.append(f"  {ms:8.1f} {calls[key]:5d}  {', '.join(key)}")
    lines += waits(rows)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
