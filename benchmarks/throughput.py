"""Tokens a second of complete training steps, beside the systems that people use, on the GPUs of
one machine.

    python benchmarks/throughput.py --gpus 2 --tokens 32768 131072 --out benchmarks/results
    python benchmarks/throughput.py --gpus 2 --tokens 524288 --layers 4 --rows rates ours alst alst:flash
    python benchmarks/throughput.py --smoke          # two CPU processes, a tiny model: does it run?

Qwen2.5-7B's shape, random weights, all parameters, AdamW with exact fp32 weights and states, one
row of random tokens split over the GPUs; a step is forward, backward, clipping and update. Rows
(`--rows`): see `_peers.py`; NAME:KERNEL asks for an attention kernel (flash is FlashAttention 2;
each system is named with the kernels that it ran). Every row is a process group of its own; one
that runs out of memory or time leaves the others alone. `--limit` bounds the command. With `--out`,
what was measured before stays in the table unless it is measured again. The share of the roofline
is that of a step which keeps attention, recomputes two thirds of the MLP and does nothing but
products at this GPU's own measured rates (row `rates`). With `--layers` every system has so many
layers of the shape, and the table is one of its own; the output layer then weighs more than in the
whole model.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _peer_bench import DEEPSPEED, SHAPES, make_config
from _table import Clock, GiB, job, log_file, machine_name, run_row, settings_line, variant, write
from longfactory.memory.seconds import roofline
from longfactory.memory.shapes import ModelShape, TrainingJob, machine

NAMES = {
    "ours": "LongFactory",
    "ours-generic": "LongFactory, Hugging Face's layer in chunks",
    "ours-recompute": "LongFactory, attention computed twice",
    "ours-overlap": "LongFactory, updates on the host during backward",
    "dpo": "LongFactory, DPO",
    "hf": "Hugging Face layers, zigzag ring, full logits",
    "ulysses": "DeepSpeed-Ulysses, ZeRO-3, full logits",
    "alst": "DeepSpeed ALST",
    "alst-bf16": "DeepSpeed ALST, optimizer in bf16",
}
KERNELS = {
    "cudnn": "cuDNN",
    "flash": "FlashAttention 2",
    "flash2": "FlashAttention 2",
    "flash3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
}


def system(r: dict[str, Any]) -> str:
    """What a result is of: the system, the attention kernels that it ran (asked for, where they are
    not known), unusual keys of the job.
    """
    known = r.get("kernels") or [r["kernel"]]
    parts = [*dict.fromkeys(KERNELS.get(k, k) for k in known if k not in ("auto", "cpu"))]
    if "memory" in r:
        parts.append(f"memory: {r['memory']}")
    if "mode" in r:
        parts.append(r["mode"])
    if "host_share" in r:
        parts.append(f"{r['host_share']:.0%} of the host's memory")
    return NAMES.get(r["row"], r["row"]) + (f" ({', '.join(parts)})" if parts else "")


def model_flops(shape: ModelShape, tokens: int) -> float:
    """FLOP of a step of one row that computes nothing twice; causal attention counted once."""
    linear = 6.0 * (shape.layers * shape.active_layer_parameters + shape.head_parameters) * tokens
    return linear + 3.5 * 2.0 * tokens * tokens * shape.heads * shape.head_dim * shape.layers


def render(results: list[dict[str, Any]], shape: ModelShape, gpus: int) -> str:
    rates = {r["tokens"]: r for r in results if r["row"] == "rates" and "gemm" in r}
    # Where a length has several of our rows, the others are compared with the plainest.
    found = [r for r in results if r["row"] == "ours" and "seconds" in r]
    ours = {
        r["tokens"]: r
        for r in sorted(found, key=lambda r: (len(variant(r)), r["kernel"] != "auto"), reverse=True)
    }
    lines = [
        (
            "| tokens | system | step, s | tokens/s a GPU | LongFactory is | share of roofline |"
            " MFU of 989 | peak, GiB a GPU | memory settings |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tokens in sorted({r["tokens"] for r in results}):
        for r in results:
            if r["tokens"] != tokens or r["row"] == "rates":
                continue
            name = system(r)
            if "error" in r:
                lines.append(f"| {tokens:,} | {name} | {r['error']} | | | | | | |")
                continue
            rate = tokens / gpus / r["seconds"]
            times = (
                f"{r['seconds'] / ours[tokens]['seconds']:.2f}x"
                if tokens in ours and r is not ours[tokens]
                else ""
            )
            share = ""
            if tokens in rates:
                m = rates[tokens]
                kind = dataclasses.replace(
                    machine("H100", gpus, 1),
                    gemm=m["gemm"],
                    attention_forward=m["attention_forward"],
                    attention_backward=m["attention_backward"],
                )
                share = f"{roofline(TrainingJob(shape, kind, tokens, gpus)) / r['seconds']:.2f}"
            mfu = model_flops(shape, tokens) / gpus / r["seconds"] / 989e12
            settings = settings_line(r["settings"]) if "settings" in r else ""
            lines.append(
                f"| {tokens:,} | {name} | {r['seconds']:.2f} | {rate:,.0f} | {times} | {share} |"
                f" {mfu:.1%} | {r['peak'] / GiB:.1f} | {settings} |"
            )
    for r in rates.values():
        lines.append(
            f"\nMeasured on this GPU at {r['measured_at']:,} tokens: products"
            f" {r['gemm'] / 1e12:.0f}, attention forward {r['attention_forward'] / 1e12:.0f},"
            f" backward {r['attention_backward'] / 1e12:.0f} TFLOP/s."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[
            "rates",
            "ours",
            "alst",
            "hf:flash",
            "alst:flash",
            "hf",
            "ours-generic",
            "ulysses",
        ],
    )
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "tiny"], default="7b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape has")
    parser.add_argument("--memory", choices=["auto", "fast", "long"], default="auto")
    parser.add_argument("--mode", default="zigzag-ring", help="sequence-parallel mode of our rows")
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="timed steps a length, after one that is not (default 2)",
    )
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds for the whole command (default 480)"
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        a.shape, a.tokens, a.gpus, a.steps = "tiny", [256, 512], 2, 1
    clock = Clock(a.limit)
    log = log_file("throughput")
    where = machine_name()
    shape = ModelShape.of(make_config(a.shape, a.layers))
    some = f", {a.layers} layers of it" if a.layers else ""
    title = (
        f"# Training throughput: {a.gpus} x {where}, {a.shape} shape{some}"
        f" ({shape.parameters / 1e9:.2f} B parameters)"
    )
    results: list[dict[str, Any]] = []
    table = ""
    for name in a.rows:
        row, _, kernel = name.partition(":")
        kernel = kernel or ("cpu" if a.smoke else "auto")
        if a.smoke and kernel == "flash":
            kernel = "cpu"
        keys: dict[str, Any] = {
            "shape": a.shape,
            "kernel": kernel,
            "memory": a.memory,
            "mode": a.mode,
            "steps": a.steps,
            "layers": a.layers,
        }
        if row in ("hf", "ulysses") and a.gpus == 1:
            keys["settings"] = {"optimizer": "host"}
        results += run_row(job(row, a.tokens, **keys), 1 if row == "rates" else a.gpus, clock, log)
        table = render(results, shape, a.gpus)
        if a.out is not None:
            file = f"throughput_{a.gpus}x{where.split()[0]}_{a.shape}" + (
                f"_{a.layers}_layers" if a.layers else ""
            )
            about = {"machine": where, "gpus": a.gpus}
            table = write(
                a.out, file, title, lambda merged: render(merged, shape, a.gpus), results, about
            )
    print(f"\n{title}\n\n{table}\n\nlog: {log}")
    if a.smoke:
        return clock.exit_code(any("error" in r and r["row"] not in DEEPSPEED for r in results))
    return clock.exit_code(not any("seconds" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
