"""What every section of `attention.py` runs in: the processes and their tensors, the clock, rows that
may fail.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import published
from longfactory import sp


@dataclasses.dataclass
class Setting:
    device: torch.device
    dtype: torch.dtype
    ranks: int
    rank: int
    lengths: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    dim: int
    packed_length: int
    check_length: int
    repeats: int
    smoke: bool

    @property
    def one(self) -> sp.SequenceParallel:
        return sp.SequenceParallel(device_type=self.device.type)


Row = dict[str, str | float | None]


rows: list[Row] = []


contexts: dict[tuple[str, str], sp.SequenceParallel] = {}


def start(smoke: bool) -> Setting:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if smoke:
        dist.init_process_group("gloo")
        device, dtype = torch.device("cpu"), torch.float32
        return Setting(device, dtype, ranks, rank, (256, 512), ((4, 2),), 16, 512, 128, 1, True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(seconds=120))
    return Setting(
        device,
        torch.bfloat16,
        ranks,
        rank,
        (65536, 131072),
        ((28, 4), (32, 8)),
        128,
        131072,
        2048,
        3,
        False,
    )


def context(setting: Setting, mode: str, backend: str = "auto") -> sp.SequenceParallel:
    if (mode, backend) not in contexts:
        contexts[mode, backend] = sp.SequenceParallel.create(
            setting.ranks, mode=mode, backend=backend, device_type=setting.device.type
        )
    return contexts[mode, backend]


def attempt(setting: Setting, name: str, body: Callable[[], Row | None]) -> Row | None:
    """A row, or the reason why there is none. Whether it failed anywhere is agreed on by all ranks."""
    row, problem = None, ""
    try:
        row = body()
    except Exception as error:
        problem = (
            f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            if str(error)
            else type(error).__name__
        )
        if setting.rank == 0:
            traceback.print_exc()
    failed = torch.tensor(float(bool(problem)), device=setting.device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed.item():
        row = {"row": name, "failed": problem or "on another rank"}
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    if row is not None:
        row = {"row": name, **row}
        rows.append(row)
        if setting.rank == 0:
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                ),
                flush=True,
            )
    return row


def note(name: str, text: str) -> None:
    """A row that says why it has no figures."""
    rows.append({"row": name, "note": text})
    if dist.get_rank() == 0:
        print(f"row {name}  note {text}", flush=True)


def inputs(
    length: int, heads: int, kv_heads: int, dim: int, setting: Setting, seed: int = 0
) -> list[Tensor]:
    """q, k, v, dout of so many rows. The same on every rank for the same seed."""
    g = torch.Generator(setting.device).manual_seed(seed)
    shape = {"device": setting.device, "dtype": setting.dtype, "generator": g}
    return [torch.randn(length, h, dim, **shape) for h in (heads, kv_heads, kv_heads, heads)]


def timed(setting: Setting, step: Callable[[], object]) -> float:
    return timed_in_turn(setting, [step], setting.repeats)[0]


def timed_in_turn(
    setting: Setting, steps: Sequence[Callable[[], object]], repeats: int
) -> list[float]:
    """Seconds of the slowest rank, median of the repeats, after one round to warm up. In turn: a
    GPU's clock falls as it grows warm.
    """
    times: list[list[float]] = [[] for _ in steps]
    for i in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            dist.barrier()
            synchronize(setting)
            began = time.perf_counter()
            step()
            synchronize(setting)
            if i:
                found.append(time.perf_counter() - began)
    worst = torch.tensor(
        [statistics.median(t) for t in times], device=setting.device, dtype=torch.float64
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def synchronize(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def forward_backward(
    attention: published.Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def planned(plan: sp.RowPlan) -> published.Attention:
    return lambda q, k, v: sp.attention(q, k, v, plan)


def speed(setting: Setting, plan: sp.RowPlan, shape: tuple[int, int], pairs: int) -> Row:
    return speed_of(setting, planned(plan), plan.local_length, shape, pairs, plan.ctx.size)


def speed_of(
    setting: Setting,
    attention: published.Attention,
    local: int,
    shape: tuple[int, int],
    pairs: int,
    gpus: int,
) -> Row:
    q, k, v, dout = inputs(local, *shape, setting.dim, setting)
    with torch.no_grad():
        forward = timed(setting, lambda: attention(q, k, v))
    both = timed(setting, lambda: forward_backward(attention, q, k, v, dout))
    return figures(setting, pairs, shape, forward, both, gpus)


def figures(
    setting: Setting, pairs: int, shape: tuple[int, int], forward: float, both: float, gpus: int
) -> Row:
    flop = 4.0 * pairs * shape[0] * setting.dim / gpus / 1e12
    return {"forward": flop / forward, "both": 3.5 * flop / both, "ms": both * 1e3}


def ratio(found: Sequence[Row | None], base: Row | None, name: str) -> None:
    if base is not None and "both" in base:
        for row in found:
            if row is not None and "both" in row:
                row[name] = row["both"] / base["both"]  # type: ignore[operator]


def about(setting: Setting) -> dict[str, Any]:
    """What was measured on, for the head of a page."""
    cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "processes": setting.ranks,
        "dtype": str(setting.dtype),
        "head dim": setting.dim,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def table(measured: Sequence[Row]) -> list[str]:
    """Rows as lines of a table, with a column for each key that one of them has."""
    columns = list(dict.fromkeys(k for r in measured for k in r))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in measured:
        cells = [r.get(c, "") for c in columns]
        lines.append(
            "| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells) + " |"
        )
    return lines
