"""The longest training step, and how memory grows with length, on the GPUs of one machine.

    python benchmarks/length.py --gpus 1 --tokens 131072 262144 458752 --out benchmarks/results
    python benchmarks/length.py --gpus 2 --rows dpo --out benchmarks/results       # preference pairs of 262,144 and 393,216 tokens
    python benchmarks/length.py --slope --out benchmarks/results        # one GPU, four layers, minutes
    python benchmarks/length.py --probe 2097152 --gpus 2                # two layers: does the length fit?
    python benchmarks/length.py --smoke

First table: one complete step (forward, backward, clipping, update of AdamW with exact fp32 weights
and states) of Qwen2.5-7B's shape with all parameters, at each length in turn until memory or time
ends; rows as in `throughput.py`. Only `ours` takes its settings from the machine (`memory: auto`).
Host bytes are of activations, all processes together: pinned, and in brackets the most in use
at once. The row `dpo` has a table of its own: one DPO pair a step, 95 % of its tokens the prompt
that both answers share. Its tokens are prompt, chosen and rejected together; beside them stand
those that were computed (with padding) and those of the same pair as two rows. Second table
(`--slope`): peak memory of forward and backward through a few layers, at lengths that a GPU has in
seconds; its growth with length, less what waits on the GPU for other layers, is the working set of
a layer, which does not depend on depth. Third (`--probe`): a step through a few layers at a length
whose whole step would take hours. Both say how many layers they ran. With `--out`, what was
measured before stays in a table unless it is measured again. `longfactory plan` prints what a step
would need.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _peer_bench import SHAPES, make_config
from _table import Clock, GiB, job, log_file, machine_name, run_row, settings_line, write
from longfactory.memory.shapes import ModelShape
from throughput import system

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
SLOPES = {
    "kept attention, leanest": LEAN,
    "attention recomputed, leanest": LEAN | {"keep_attention": 0.0, "offload": "inputs"},
}


def length_table(results: list[dict[str, Any]], gpus: int) -> str:
    pairs = any(r["row"] == "dpo" for r in results)
    columns = [
        "system",
        "tokens",
        *(["computed", "as two rows"] if pairs else []),
        "step, s",
        "tokens/s a GPU",
        "peak, GiB a GPU",
    ]
    columns += ["pinned host, GiB", "B of it a token", "memory settings"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in results:
        cells = [system(r), f"{r['tokens']:,}"]
        if "error" in r:
            cells.append(r["error"])
        else:
            if pairs:
                cells += [f"{r[k]:,}" if k in r else "" for k in ("computed", "as_two_rows")]
            host = [r[k] * gpus for k in ("locked", "used") if k in r]  # neither of other systems
            cells += [
                f"{r['seconds']:.1f}",
                f"{r['tokens'] / gpus / r['seconds']:,.0f}",
                f"{r['peak'] / GiB:.1f}",
            ]
            cells.append(_locked_used([f"{x / GiB:.1f}" for x in host]))
            cells.append(_locked_used([f"{x / r['tokens']:,.0f}" for x in host]))
            cells.append(settings_line(r["settings"]) if "settings" in r else "")
        lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return "\n".join(lines)


def _locked_used(numbers: list[str]) -> str:
    return "".join(numbers[:1] + [f" ({n})" for n in numbers[1:]])


def slope_table(results: list[dict[str, Any]], shape: ModelShape, layers: int) -> str:
    """Growth of the peak between neighbouring lengths; `waiting` is what the last layers leave on
    the GPU by their settings.
    """
    lines = [
        f"{layers} of {shape.layers} layers, forward and backward, no optimizer, one GPU.\n",
        (
            "| layer | tokens | peak, GiB | bytes a token since the row above | of them layer"
            " inputs and attention that wait | working set |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["name"] for r in results):
        before: dict[str, Any] | None = None
        for r in (r for r in results if r["name"] == name):
            if "error" in r:
                lines.append(f"| {name} | {r['tokens']:,} | {r['error']} | | | |")
                continue
            growth = waiting = working = ""
            if before is not None:
                per = (r["peak"] - before["peak"]) / (r["tokens"] - before["tokens"])
                s = r.get("settings")
                stay = layers if s is None or s["offload"] == "none" else s["last_layers_on_gpu"]
                kept = 0 if s is None else shape.saved_attention_bytes * s["keep_attention"]
                wait = stay * (
                    2 * shape.hidden + (kept if s is None or s["offload"] != "inputs" else 0)
                )
                growth, waiting, working = f"{per:,.0f}", f"{wait:,.0f}", f"{per - wait:,.0f}"
            lines.append(
                f"| {name} | {r['tokens']:,} | {r['peak'] / GiB:.2f} | {growth} | {waiting} |"
                f" {working} |"
            )
            before = r
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=None,
        help="ascending; default by the number of GPUs",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["ours"],
        help="ours, dpo, hf:flash, hf, alst, alst:flash, ulysses",
    )
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "tiny"], default="7b")
    parser.add_argument("--memory", choices=["auto", "fast", "long"], default="auto")
    parser.add_argument("--mode", default="zigzag-ring")
    parser.add_argument(
        "--host-share",
        type=float,
        default=1.0,
        help="plan as if the host had this share of its memory",
    )
    parser.add_argument("--slope", action="store_true")
    parser.add_argument("--probe", type=int, default=None, metavar="TOKENS")
    parser.add_argument(
        "--layers",
        type=int,
        default=None,
        help="layers of --slope (default 4) and --probe (default 2)",
    )
    parser.add_argument(
        "--limit", type=float, default=560, help="seconds for the whole command (default 560)"
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        a.shape, a.gpus = "tiny", 2
    clock, log, where = Clock(a.limit), log_file("length"), machine_name()
    shape = ModelShape.of(make_config(a.shape))
    kernel = "cpu" if a.smoke else "auto"
    about = {"machine": where, "gpus": a.gpus}
    one = {
        "shape": a.shape,
        "steps": 1,
        "warm": False,
        "memory": a.memory,
        "mode": a.mode,
        "host_share": a.host_share,
    }
    failed = False
    if a.slope or a.smoke:
        layers = a.layers or (2 if a.smoke else 4)
        short = [256, 512] if a.smoke else [32768, 65536, 131072]
        few: dict[str, Any] = {**one, "kernel": kernel, "layers": layers, "optimizer": False}
        jobs = [job("slope", short, **few, name=name, settings=s) for name, s in SLOPES.items()]
        jobs.append(
            job(
                "ours-generic",
                short,
                **few,
                name="generic: Hugging Face's layer in pieces",
                settings=LEAN,
            )
        )
        jobs.append(
            job(
                "hf",
                short if a.smoke else short[:1],
                **few,
                name="Hugging Face layers, full logits",
            )
        )
        results: list[dict[str, Any]] = []
        for what in jobs:
            results += run_row(what, 1, clock, log)
            table = slope_table(results, shape, layers)
            if a.out is not None:
                title = f"# Bytes of GPU memory a token: 1 x {where}, {a.shape} shape"
                file = f"slope_{where.split()[0]}_{a.shape}" + (
                    "" if a.layers is None else f"_{layers}_layers"
                )
                few_about = {"machine": where, "layers": layers}
                table = write(
                    a.out,
                    file,
                    title,
                    lambda merged: slope_table(merged, shape, layers),
                    results,
                    few_about,
                )
        print("\n" + table + "\n")
        failed |= any("error" in r for r in results)
        if a.slope:
            print(f"log: {log}")
            return clock.exit_code(failed)
    system_name = f"{a.gpus}x{where.split()[0]}_{a.shape}"
    if a.probe is not None:
        layers = a.layers or 2
        file = f"probe_{system_name}" + ("" if a.layers is None else f"_{layers}_layers")
        rows = [
            (
                file,
                f"# One step through {layers} of {shape.layers} layers: {a.gpus} x {where}",
                ["ours"],
            )
        ]
        one |= {"layers": layers, "settings": LEAN}
    else:
        texts = [row for row in a.rows if row.partition(":")[0] != "dpo"]
        pairs = [row for row in a.rows if row not in texts]
        rows = [
            (
                f"length_{system_name}",
                f"# Longest step: {a.gpus} x {where}, {a.shape} shape",
                texts,
            ),
            (
                f"length_dpo_{system_name}",
                f"# Longest DPO pair, 95 % of it prompt: {a.gpus} x {where}, {a.shape} shape",
                pairs,
            ),
        ]
    for file, title, wanted in rows:
        results, table = [], ""
        for text in wanted:
            row, _, asked = text.partition(":")
            keys = {**one, "kernel": "cpu" if a.smoke else asked or "auto"}
            if row in ("hf", "ulysses") and a.gpus == 1:
                keys["settings"] = {"optimizer": "host"}
            results += run_row(job(row, lengths(a, row), **keys), a.gpus, clock, log)
            table = length_table(results, a.gpus)
            if a.out is not None:
                table = write(
                    a.out, file, title, lambda merged: length_table(merged, a.gpus), results, about
                )
        if wanted:
            failed |= not any("seconds" in r for r in results) or (
                a.smoke and any("error" in r for r in results)
            )
            print(f"\n{title}\n\n{table}\n")
    print(f"log: {log}")
    return clock.exit_code(failed)


def lengths(a: argparse.Namespace, row: str) -> list[int]:
    """The lengths of a row: what was asked for, else what this many GPUs may reach in one command."""
    if a.smoke:
        return [256, 512]
    if a.probe is not None:
        return [a.probe]
    usual = {1: [131072, 262144, 393216], 2: [262144, 393216 if row == "dpo" else 524288]}
    return a.tokens or usual.get(a.gpus, [524288, 1048576])


if __name__ == "__main__":
    sys.exit(main())
