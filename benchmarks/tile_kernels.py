"""The engine's own attention kernels (`sp/backends/tile_kernels.py`) in several sizes of blocks: how
the table `SETTINGS` there was chosen.

    python benchmarks/tile_kernels.py --limit 150           # one GPU
    python benchmarks/tile_kernels.py --smoke               # tiny, interpreted (TRITON_INTERPRET=1)

A row is one of the three kernels for the heads of a model on 32,768 tokens in bf16: milliseconds
(the least of five), and TFLOP/s of the products that the mask needs of it (two forward, four for the
gradients of keys and values, three for those of queries). `*` marks what `SETTINGS` has.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


class Case(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    dim: int
    window: int | None
    softcap: float | None


CASES = (
    Case("Gemma-2-9B, causal", 16, 8, 256, None, 50.0),
    Case("gpt-oss, window", 64, 8, 64, 128, None),
    Case("Gemma-2-27B, causal", 32, 16, 128, None, 50.0),
    Case("Gemma-2-9B, window", 16, 8, 256, 4096, 50.0),
)
TRIED: dict[int, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    256: {
        "forward": ((128, 64, 8, 2), (128, 32, 8, 3)),
        "keys": ((32, 64, 8, 2), (64, 64, 8, 2)),
        "queries": ((128, 32, 8, 2), (64, 64, 8, 2)),
    },
    128: {
        "forward": ((128, 64, 8, 3), (64, 64, 4, 3)),
        "keys": ((32, 128, 8, 2), (64, 128, 8, 2)),
        "queries": ((128, 64, 8, 2), (64, 64, 4, 3)),
    },
    64: {
        "forward": ((64, 64, 4, 3), (64, 32, 4, 3)),
        "keys": ((32, 64, 4, 2), (64, 64, 4, 2)),
        "queries": ((64, 64, 4, 2), (64, 32, 4, 2)),
    },
}
"""By head dim and kernel: rows of queries, of keys, warps, stages."""
PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}


def pairs(length: int, window: int | None) -> float:
    """Queries and keys that see each other."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return length * window - window * (window - 1) / 2


def measure(case: Case, length: int, smoke: bool, until: float) -> None:
    import torch

    from longfactory.sp.backends import tile_calls as kernels
    from longfactory.sp.tiles import Tile

    device, dtype = ("cpu", torch.float16) if smoke else ("cuda", torch.bfloat16)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, dout = (torch.randn(length, h, case.dim, device=device, dtype=dtype) for h in heads)
    rows = slice(0, length)
    window = None if case.window is None else case.window - 1
    tile, scale = Tile(rows, rows, "causal", window=window), case.dim**-0.5
    out, lse = kernels.forward(q, k, v, tile, scale, case.softcap)
    shape, mask = kernels._shape(q, k, v), kernels._mask(tile, q, case.softcap)
    backward = kernels.Backward(dout, q, k, v, out, lse, shape, mask, scale, case.softcap)
    calls: dict[str, Any] = {
        "forward": lambda: kernels.forward(q, k, v, tile, scale, case.softcap),
        "keys": backward.keys,
        "queries": backward.queries,
    }
    size = 2 * pairs(length, case.window) * case.heads * case.dim
    for kernel, call in calls.items():
        own, smaller = kernels.SETTINGS[kernel][case.dim], kernels.SMALLER[kernel]
        for tried in TRIED[case.dim][kernel]:
            blocks = kernels.Blocks(*tried)
            if time.monotonic() > until:
                print(
                    f"| {case.name} | {kernel} | {blocks} | not started: time is up |", flush=True
                )
                continue
            # no others where these do not fit
            kernels.SETTINGS[kernel][case.dim] = kernels.SMALLER[kernel] = blocks
            try:
                least = min(_seconds(call, smoke) for _ in range(2 if smoke else 6))
                found = f"{1000 * least:.2f} | {PRODUCTS[kernel] * size / least / 1e12:.0f}"
            except Exception as error:  # a block too large for the GPU's shared memory
                found = f"{type(error).__name__}: {str(error).splitlines()[0][:120]} |"
            mark = " *" if blocks == own else ""
            shown = ", ".join(map(str, tried))
            print(f"| {case.name} | {kernel} | {shown}{mark} | {found} |", flush=True)
        kernels.SETTINGS[kernel][case.dim], kernels.SMALLER[kernel] = own, smaller


def _seconds(call: Any, smoke: bool) -> float:
    import torch

    if smoke:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=150.0, help="seconds")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    until = time.monotonic() + a.limit
    print("| heads and mask | kernel | queries, keys, warps, stages | ms | TFLOP/s |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for case in CASES:
        measure(case, 64 if a.smoke else 32_768, a.smoke, until)


if __name__ == "__main__":
    main()
