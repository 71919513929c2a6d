"""Tokens a second of complete training steps, beside the systems that people use, on the GPUs of one machine.

    python benchmarks/throughput.py --gpus 2 --tokens 32768 131072 --out benchmarks/results
    python benchmarks/throughput.py --smoke          # two CPU processes, a tiny model: does it run?

Qwen2.5-7B's shape, random weights, all parameters, AdamW with exact fp32 weights and states, one row of random tokens split over the
GPUs; a step is forward, backward, clipping and update. Rows (`--rows`): see `_peers.py`; NAME:KERNEL asks for an attention kernel (flash is
FlashAttention 2). Every row is a process group of its own; one that runs out of memory or time leaves the others alone. `--limit` bounds
the command. The share of the roofline is that of a step which keeps attention, recomputes two thirds of the MLP and does nothing but
products at this GPU's own measured rates (row `rates`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _peers import SHAPES, make_config
from _table import Clock, GiB, job, log_file, machine_name, run_row, settings_line, write

from longfactory.plan.model import Job as PlanJob
from longfactory.plan.model import roofline
from longfactory.plan.shapes import ModelShape, machine

NAMES = {
    "ours": "LongFactory",
    "ours-generic": "LongFactory, Hugging Face's layer in pieces",
    "ours-recompute": "LongFactory, attention computed twice",
    "hf": "Hugging Face layers, zigzag ring, full logits",
    "ulysses": "DeepSpeed-Ulysses, ZeRO-3, full logits",
    "alst": "DeepSpeed ALST",
}
KERNELS = {"auto": "", "cudnn": " (cuDNN)", "flash": " (FlashAttention 2)", "fa4": " (FlashAttention 4)", "cpu": ""}


def model_flops(shape: ModelShape, tokens: int) -> float:
    """FLOP of a step of one row that computes nothing twice; causal attention counted once."""
    linear = 6.0 * (shape.layers * shape.active_layer_parameters + shape.head_parameters) * tokens
    return linear + 3.5 * 2.0 * tokens * tokens * shape.heads * shape.head_dim * shape.layers


def render(results: list[dict[str, Any]], shape: ModelShape, gpus: int, lengths: list[int]) -> str:
    rates = {r["tokens"]: r for r in results if r["row"] == "rates" and "gemm" in r}
    ours = {r["tokens"]: r for r in results if r["row"] == "ours" and "seconds" in r}
    lines = [
        "| tokens | system | step, s | tokens/s a GPU | LongFactory is | share of roofline | MFU of 989 | peak, GiB a GPU | memory settings |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tokens in lengths:
        for r in results:
            if r["tokens"] != tokens or r["row"] == "rates":
                continue
            name = NAMES.get(r["row"], r["row"]) + KERNELS.get(r["kernel"], f" ({r['kernel']})")
            if "error" in r:
                lines.append(f"| {tokens:,} | {name} | {r['error']} | | | | | | |")
                continue
            rate = tokens / gpus / r["seconds"]
            times = f"{r['seconds'] / ours[tokens]['seconds']:.2f}x" if tokens in ours and r is not ours[tokens] else ""
            share = ""
            if tokens in rates:
                m = rates[tokens]
                kind = dataclasses.replace(
                    machine("H100", gpus, 1),
                    gemm=m["gemm"],
                    attention_forward=m["attention_forward"],
                    attention_backward=m["attention_backward"],
                )
                share = f"{roofline(PlanJob(shape, kind, tokens, gpus)) / r['seconds']:.2f}"
            mfu = model_flops(shape, tokens) / gpus / r["seconds"] / 989e12
            settings = settings_line(r["settings"]) if "settings" in r else ""
            lines.append(
                f"| {tokens:,} | {name} | {r['seconds']:.2f} | {rate:,.0f} | {times} | {share} | {mfu:.1%} | {r['peak'] / GiB:.1f} | {settings} |"  # noqa: E501
            )
    for r in rates.values():
        lines.append(
            f"\nMeasured on this GPU at {r['measured_at']:,} tokens: products {r['gemm'] / 1e12:.0f}, attention forward "
            f"{r['attention_forward'] / 1e12:.0f}, backward {r['attention_backward'] / 1e12:.0f} TFLOP/s."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--rows", nargs="+", default=["rates", "ours", "alst", "hf:flash", "alst:flash", "hf", "ours-generic", "ulysses"])
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "tiny"], default="7b")
    parser.add_argument("--memory", choices=["auto", "fast", "long"], default="auto")
    parser.add_argument("--mode", default="zigzag-ring", help="sequence-parallel mode of our rows")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a length, after one that is not (default 2)")
    parser.add_argument("--limit", type=float, default=480, help="seconds for the whole command (default 480)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        a.shape, a.tokens, a.gpus, a.steps = "tiny", [256, 512], 2, 1
    clock = Clock(a.limit)
    log = log_file("throughput")
    where = machine_name()
    shape = ModelShape.of(make_config(a.shape))
    title = f"# Training throughput: {a.gpus} x {where}, {a.shape} shape ({shape.parameters / 1e9:.2f} B parameters)"
    results: list[dict[str, Any]] = []
    table = ""
    for name in a.rows:
        row, _, kernel = name.partition(":")
        kernel = kernel or ("cpu" if a.smoke else "auto")
        if a.smoke and kernel == "flash":
            kernel = "cpu"
        keys: dict[str, Any] = {"shape": a.shape, "kernel": kernel, "memory": a.memory, "mode": a.mode, "steps": a.steps}
        if row in ("hf", "ulysses") and a.gpus == 1:
            keys["settings"] = {"optimizer": "host"}
        results += run_row(job(row, a.tokens, **keys), 1 if row == "rates" else a.gpus, clock, log)
        table = render(results, shape, a.gpus, a.tokens)
        if a.out is not None:
            write(a.out, f"throughput_{a.gpus}x{where.split()[0]}_{a.shape}", title, table, results, {"machine": where, "gpus": a.gpus})
    print(f"\n{title}\n\n{table}\n\nlog: {log}")
    if a.smoke:
        return int(any("error" in r and r["row"] not in ("alst", "ulysses") for r in results))
    return int(not any("seconds" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
