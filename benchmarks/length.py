"""The longest training step, and how memory grows with length, on the GPUs of one machine.

    python benchmarks/length.py --gpus 1 --tokens 131072 262144 458752 --out benchmarks/results
    python benchmarks/length.py --slope --out benchmarks/results        # one GPU, four layers, minutes
    python benchmarks/length.py --probe 2097152 --gpus 2                # two layers: does the length fit?
    python benchmarks/length.py --smoke

First table: one complete step (forward, backward, clipping, update of AdamW with exact fp32 weights and states) of Qwen2.5-7B's shape
with all parameters, at each length in turn until memory or time ends; rows as in `throughput.py`. Only `ours` takes its settings from the
machine (`memory: auto`). Second table (`--slope`): peak memory of forward and backward through a few layers, at lengths that a GPU has in
seconds; its growth with length, less what waits on the GPU for other layers, is the working set of a layer, which does not depend on depth.
Third (`--probe`): a step through a few layers at a length whose whole step would take hours. Both say how many layers they ran.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _peers import SHAPES, make_config
from _table import Clock, GiB, job, log_file, machine_name, run_row, settings_line, write
from throughput import KERNELS, NAMES

from longfactory.plan.model import kept_bytes
from longfactory.plan.shapes import ModelShape

# The leanest layer: everything that can leave the GPU does.
LEAN: dict[str, Any] = {
    "keep_attention": 1.0,
    "offload": "inputs+attention",
    "last_layers_on_gpu": 1,
    "mlp_chunk": 4096,
    "attention_groups": 4,
    "segment_layers": 1,
    "late_prefetch": True,
    "optimizer": "gpu",
}
SLOPES = {"kept attention, leanest": LEAN, "attention recomputed, leanest": LEAN | {"keep_attention": 0.0, "offload": "inputs"}}


def length_table(results: list[dict[str, Any]], gpus: int) -> str:
    lines = [
        "| system | tokens | step, s | tokens/s a GPU | peak, GiB a GPU | page-locked host, GiB | B of it a token | memory settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        name = NAMES.get(r["row"], r["row"]) + KERNELS.get(r["kernel"], f" ({r['kernel']})")
        if "error" in r:
            lines.append(f"| {name} | {r['tokens']:,} | {r['error']} | | | | | |")
            continue
        locked = r.get("locked", 0) * gpus
        settings = settings_line(r["settings"]) if "settings" in r else ""
        lines.append(
            f"| {name} | {r['tokens']:,} | {r['seconds']:.1f} | {r['tokens'] / gpus / r['seconds']:,.0f} | {r['peak'] / GiB:.1f} | "
            f"{locked / GiB:.1f} | {locked / r['tokens']:,.0f} | {settings} |"
        )
    return "\n".join(lines)


def slope_table(rows: list[tuple[str, list[dict[str, Any]]]], shape: ModelShape, layers: int) -> str:
    """Growth of the peak between neighbouring lengths; `waiting` is what the last layers leave on the GPU by their settings."""
    lines = [
        f"{layers} of {shape.layers} layers, forward and backward, no optimizer, one GPU.\n",
        "| layer | tokens | peak, GiB | bytes a token since the row above | of them layer inputs and attention that wait | working set |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in rows:
        before: dict[str, Any] | None = None
        for r in results:
            if "error" in r:
                lines.append(f"| {name} | {r['tokens']:,} | {r['error']} | | | |")
                continue
            growth = waiting = working = ""
            if before is not None:
                per = (r["peak"] - before["peak"]) / (r["tokens"] - before["tokens"])
                s = r.get("settings")
                stay = layers if s is None or s["offload"] == "none" else s["last_layers_on_gpu"]
                kept = 0 if s is None else kept_bytes(shape) * s["keep_attention"]
                wait = stay * (2 * shape.hidden + (kept if s is None or s["offload"] != "inputs" else 0))
                growth, waiting, working = f"{per:,.0f}", f"{wait:,.0f}", f"{per - wait:,.0f}"
            lines.append(f"| {name} | {r['tokens']:,} | {r['peak'] / GiB:.2f} | {growth} | {waiting} | {working} |")
            before = r
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="ascending; default by the number of GPUs")
    parser.add_argument("--rows", nargs="+", default=["ours"], help="ours, hf:flash, hf, alst, alst:flash, ulysses")
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "tiny"], default="7b")
    parser.add_argument("--memory", choices=["auto", "fast", "long"], default="auto")
    parser.add_argument("--mode", default="zigzag-ring")
    parser.add_argument("--host-share", type=float, default=1.0, help="plan as if the host had this share of its memory")
    parser.add_argument("--slope", action="store_true")
    parser.add_argument("--probe", type=int, default=None, metavar="TOKENS")
    parser.add_argument("--layers", type=int, default=None, help="layers of --slope (default 4) and --probe (default 2)")
    parser.add_argument("--limit", type=float, default=560, help="seconds for the whole command (default 560)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        a.shape, a.gpus = "tiny", 2
    clock, log, where = Clock(a.limit), log_file("length"), machine_name()
    shape = ModelShape.of(make_config(a.shape))
    kernel = "cpu" if a.smoke else "auto"
    about = {"machine": where, "gpus": a.gpus}
    one = {"shape": a.shape, "steps": 1, "warm": False, "memory": a.memory, "mode": a.mode, "host_share": a.host_share}
    failed = False
    if a.slope or a.smoke:
        layers = a.layers or (2 if a.smoke else 4)
        lengths = [256, 512] if a.smoke else [32768, 65536, 131072]
        rows = []
        peers = [
            (
                "Hugging Face layers, full logits",
                job("hf", lengths[:1] if not a.smoke else lengths, **one, kernel=kernel, layers=layers, optimizer=False),
            )
        ]
        jobs = [
            (name, job("slope", lengths, **one, kernel=kernel, layers=layers, settings=s, optimizer=False)) for name, s in SLOPES.items()
        ]
        jobs.append(
            (
                "generic: Hugging Face's layer in pieces",
                job("ours-generic", lengths, **one, kernel=kernel, layers=layers, settings=LEAN, optimizer=False),
            )
        )
        for name, what in jobs + peers:
            rows.append((name, run_row(what, 1, clock, log)))
            table = slope_table(rows, shape, layers)
            if a.out is not None:
                title = f"# Bytes of GPU memory a token: 1 x {where}, {a.shape} shape"
                write(
                    a.out,
                    f"slope_{where.split()[0]}_{a.shape}",
                    title,
                    table,
                    [r for _, rs in rows for r in rs],
                    {"machine": where, "layers": layers},
                )
        print("\n" + table + "\n")
        failed |= any("error" in r for _, rs in rows for r in rs)
        if a.slope:
            print(f"log: {log}")
            return int(failed)
    if a.probe is not None:
        layers = a.layers or 2
        results = run_row(job("ours", [a.probe], **one, kernel=kernel, layers=layers, settings=LEAN), a.gpus, clock, log)
        table = f"{layers} of {shape.layers} layers.\n\n" + length_table(results, a.gpus)
        name, title = f"probe_{a.gpus}x{where.split()[0]}_{a.shape}", f"# One step through {layers} layers: {a.gpus} x {where}"
    else:
        lengths = a.tokens or {1: [131072, 262144, 393216], 2: [262144, 524288]}.get(a.gpus, [524288, 1048576])
        if a.smoke:
            lengths = [256, 512]
        results = []
        for text in a.rows:
            row, _, wanted = text.partition(":")
            keys = {**one, "kernel": "cpu" if a.smoke else wanted or "auto"}
            if row in ("hf", "ulysses") and a.gpus == 1:
                keys["settings"] = {"optimizer": "host"}
            results += run_row(job(row, lengths, **keys), a.gpus, clock, log)
        table = length_table(results, a.gpus)
        name, title = f"length_{a.gpus}x{where.split()[0]}_{a.shape}", f"# Longest step: {a.gpus} x {where}, {a.shape} shape"
    failed |= not any("seconds" in r for r in results) or (a.smoke and any("error" in r for r in results))
    if a.out is not None:
        write(a.out, name, title, table, results, about)
    print(f"\n{title}\n\n{table}\n\nlog: {log}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
