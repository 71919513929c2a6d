"""Attention in float32 on one GPU: PyTorch's memory-efficient kernel, and the plain formulas with
and without blocks of keys.

    python benchmarks/attention_fp32.py --out benchmarks/results          # one GPU, some five minutes
    python benchmarks/attention_fp32.py --smoke --out results             # CPU, tiny shapes: does it run?

One causal document, 8 query heads and 2 key heads. A row is a kernel at a length and a head dim:
milliseconds and TFLOP/s forward and backward (2 * T * T * heads * D forward, 2.5 times that
backward), the memory beyond the inputs, and the error of the last rows' output from float64. `math`
takes all keys at once, as far as the memory goes; `chunked` is what runs: blocks of keys. Beside
them bf16's kernel. The rates of fp32 in `longfactory/memory/shapes.py` (FLOAT32, float32_rates) are
to be set from this table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from _attention_setting import table
from _table import command_line
from longfactory.sp import backends
from longfactory.sp.tiles import Tile

HEADS, KV_HEADS = 8, 2
KERNELS = ("bf16", "efficient", "chunked", "math")
Row = dict[str, str | float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=None, help="tokens (default 4096 16384 65536)"
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", default=None, help="head dims (default 64 128 256)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="a kernel that would take longer a step is left out (default 20)",
    )
    a = parser.parse_args()
    if not a.smoke and not torch.cuda.is_available():
        raise SystemExit("No GPU here. --smoke runs tiny shapes on a CPU.")
    device = torch.device("cpu" if a.smoke else "cuda")
    lengths = a.lengths or ([64, 128] if a.smoke else [4096, 16384, 65536])
    dims = a.dims or ([16] if a.smoke else [64, 128, 256])
    rows: list[Row] = []
    slowest: dict[tuple[str, int], float] = {}
    for dim in dims:
        for length in lengths:
            for kernel in KERNELS:
                before = slowest.get((kernel, dim))
                expected = (
                    0.0
                    if before is None
                    else before * (length / lengths[lengths.index(length) - 1]) ** 2
                )
                if expected > a.seconds:
                    row: Row = {
                        "kernel": kernel,
                        "tokens": length,
                        "head dim": dim,
                        "note": f"left out: about {expected:.0f} s a step",
                    }
                else:
                    row = measure(kernel, length, dim, device)
                    slowest[kernel, dim] = (
                        float(row.get("forward ms", 0.0)) / 1e3
                        + float(row.get("backward ms", 0.0)) / 1e3
                    )
                rows.append(row)
                print(
                    "  ".join(
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    ),
                    flush=True,
                )
    write(rows, device, a.out)


def measure(kernel: str, length: int, dim: int, device: torch.device) -> Row:
    """One kernel at one shape; a kernel that cannot do it gives its reason."""
    row: Row = {"kernel": kernel, "tokens": length, "head dim": dim}
    tile = Tile(slice(0, length), slice(0, length), "causal", first=True)
    g = torch.Generator(device).manual_seed(0)
    shapes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, dout = (torch.randn(length, h, dim, device=device, generator=g) for h in shapes)
    if kernel == "bf16":
        q, k, v, dout = (x.bfloat16() for x in (q, k, v, dout))
        backend = backends.select("auto", tile, q, v, None)
    else:
        backend = backends.BACKENDS["efficient" if kernel == "efficient" else "math"]
    request = backends.request_for(tile, q, v, None)
    reason = backend.refuses(request) or backends.failure(
        "efficient" if kernel == "efficient" else "math", request
    )
    if reason is not None:
        return {**row, "note": reason}
    blocks = backends.math.KEY_BLOCK
    if kernel == "math":
        backends.math.KEY_BLOCK = length
    scale = dim**-0.5
    try:
        held = allocated(device)
        peak_of(device)
        out, lse = backend.forward(q, k, v, tile, scale, None)
        forward = timed(lambda: backend.forward(q, k, v, tile, scale, None), device)
        backward = timed(
            lambda: backend.backward(dout, q, k, v, out, lse, tile, scale, None), device
        )
        peak = peak_of(device) - held
    except torch.OutOfMemoryError:
        return {**row, "note": "out of memory"}
    finally:
        backends.math.KEY_BLOCK = blocks
        if device.type == "cuda":
            torch.cuda.empty_cache()
    flop = 2.0 * length * (length + 1) * HEADS * dim / 1e12
    row |= {"forward ms": forward * 1e3, "backward ms": backward * 1e3}
    row |= {
        "forward TFLOP/s": flop / forward,
        "backward TFLOP/s": 2.5 * flop / backward,
        "GiB": peak / 2**30,
    }
    if kernel != "bf16":
        row["error"] = last_rows_error(q, k, v, out, scale)
    return row


def last_rows_error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float
) -> float:
    """Relative error of the last 64 queries' output, against float64."""
    count = min(64, len(q))
    wide = [x.double() for x in (q[-count:], k, v)]
    scores = (
        torch.einsum("qhd,khd->hqk", wide[0], wide[1].repeat_interleave(HEADS // KV_HEADS, 1))
        * scale
    )
    seen = torch.arange(len(k), device=q.device) <= torch.arange(
        len(q) - count, len(q), device=q.device
    ).unsqueeze(1)
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", p, wide[2].repeat_interleave(HEADS // KV_HEADS, 1))
    return ((out[-count:].double() - exact).norm() / exact.norm()).item()


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds, median of three."""
    times = []
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device) -> float:
    return float(torch.cuda.memory_allocated()) if device.type == "cuda" else 0.0


def peak_of(device: torch.device) -> float:
    """Bytes: the peak since the last call. 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    peak = float(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def write(rows: list[Row], device: torch.device, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "tf32": str(torch.backends.cuda.matmul.allow_tf32),
        "command": command_line(),
    }
    (folder / "attention_fp32.json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    lines = ["# Attention in float32", "", ", ".join(f"{k}: {v}" for k, v in about.items()), ""]
    lines += table(rows)
    (folder / "attention_fp32.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
