"""What LoRA's products cost beside those of the weights, in the ways to add them: the decision for
`memory/layer/linears.py`.

    python benchmarks/adapter_products.py            # one GPU, 20 s
    python benchmarks/adapter_products.py --smoke

For y = x W^T + s (x A^T) B^T on a chunk of 8,192 tokens, bf16, the linear maps of Qwen2.5-7B:
`base` is x W^T alone; `added` is what the hand-written layer does, x A^T and then one product with
B^T that is added in place; `beside` is one product of [x | x A^T] with [W | s B]^T, whose wider
matrices are there already (the copies that make them are the next column, a copy of W for each pass
over a layer included). Milliseconds, the least of 20.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

MAPS = {"q": (3584, 3584), "gate": (3584, 18944), "down": (18944, 3584)}


def milliseconds(call: Callable[[], object], device: str) -> float:
    least = float("inf")
    for _ in range(3 if device == "cpu" else 23):
        if device == "cpu":
            begun = time.perf_counter()
            call()
            least = min(least, 1000 * (time.perf_counter() - begun))
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        least = min(least, start.elapsed_time(stop))
    return least


def row(name: str, inner: int, outer: int, rank: int, tokens: int, device: str) -> str:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, w, a, b = (
        torch.randn(*size, device=device).to(dtype)
        for size in ((tokens, inner), (outer, inner), (rank, inner), (outer, rank))
    )
    y = x.new_empty(tokens, outer)
    padded = -(-rank // 8) * 8
    wide_x, wide_w = x.new_zeros(tokens, inner + padded), x.new_zeros(outer, inner + padded)

    def added() -> Tensor:
        return torch.mm(x, w.t(), out=y).addmm_(x @ a.t(), b.t(), alpha=2.0)

    def copies() -> None:
        wide_w[:, :inner], wide_w[:, inner : inner + rank] = w, b
        wide_x[:, :inner], wide_x[:, inner : inner + rank] = x, x @ a.t()

    def beside() -> Tensor:
        torch.mm(x, a.t(), out=wide_x[:, inner : inner + rank])
        return torch.mm(wide_x, wide_w.t(), out=y)

    times = [
        milliseconds(call, device)
        for call in (lambda: torch.mm(x, w.t(), out=y), added, beside, copies)
    ]
    shown = " | ".join(f"{ms:.3f}" for ms in times)
    return f"| {name}, {inner} -> {outer} | {rank} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    device, tokens = ("cpu", 64) if a.smoke else ("cuda", 8192)
    print("| map | rank | base | added | beside | copies |\n|---|---|---|---|---|---|", flush=True)
    for rank in (8, 64):
        for name, (inner, outer) in MAPS.items():
            small = 32 if a.smoke else 1
            print(row(name, inner // small, outer // small, rank, tokens, device), flush=True)


if __name__ == "__main__":
    main()
