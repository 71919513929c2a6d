"""Training through `longfactory train` with and without sequence parallelism, side by side on the
GPUs of one machine.

    python benchmarks/sp_training.py --out benchmarks/results

Qwen2.5-7B's shape with random weights, all parameters, bf16 with fp32 master weights, FSDP2, rows
of real text; every run takes the same samples in the same steps, so the losses must agree. Writes
one table: losses, tokens/s for each GPU, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from longfactory.sp.distance import worst  # noqa: E402
from make_model import make_model  # noqa: E402


def make_data(folder: Path, rows: int, characters: int) -> None:
    """Long texts from Python's manual: topics in random order, end to end."""
    import pydoc_data.topics

    topics = sorted(pydoc_data.topics.topics.values())
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(0)
    with open(folder / "long.jsonl", "w") as f:
        for _ in range(rows):
            text = ""
            while len(text) < characters:
                text += "\n\n".join(order.sample(topics, len(topics)))
            f.write(json.dumps({"text": text[:characters]}) + "\n")
    info = {"long": {"file_name": "long.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def run(
    model: Path,
    data: Path,
    out: Path,
    length: int,
    size: int,
    mode: str,
    world: int,
    steps: int,
    extra: list[str],
) -> dict[str, Any]:
    """One run of `longfactory train`; what its log says."""
    keys = {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "stage": "pt",
        "finetuning_type": "full",
        "dataset": "long",
        "dataset_dir": data,
        "cutoff_len": length,
        "packing": "false",
        "sequence_parallel_size": size,
        "sequence_parallel_mode": mode,
        "nproc_per_node": world,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": size,  # the same `world` samples in every step
        "max_steps": steps,
        "learning_rate": "1e-5",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": out,
        "overwrite_output_dir": "true",
        "disable_shuffling": "true",
        "include_num_input_tokens_seen": "true",
        "report_to": "none",
        "save_final_model": "false",
    }
    if world > 1 and shutil.which("nvidia-smi"):
        keys |= {"bf16": "true", "sharding": "fsdp2"}
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    for k, v in keys.items():
        command += [f"--{k}", str(v)]
    started = time.time()
    env = {**os.environ, "RECORD_VRAM": "1", "LONGFACTORY_CACHE": str(data / "cache")}
    done = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True, env=env)
    row: dict[str, Any] = {
        "length": length,
        "sp": size,
        "mode": mode if size > 1 else "-",
        "seconds": round(time.time() - started),
    }
    log = out / "trainer_log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    steps_done = [x for x in lines if "loss" in x]
    row["losses"] = [round(x["loss"], 5) for x in steps_done]
    if len(steps_done) > 1 and "total_tokens" in steps_done[0]:
        # The first step compiles and allocates: not counted.
        tokens = steps_done[-1]["total_tokens"] - steps_done[0]["total_tokens"]
        row["tokens_per_s_gpu"] = round(
            tokens / (steps_done[-1]["elapsed_seconds"] - steps_done[0]["elapsed_seconds"]) / world
        )
        row["peak_gib"] = steps_done[-1].get("vram_allocated")
    if done.returncode:
        row["error"] = done.stderr[-1500:]
    log_text = done.stdout + done.stderr
    row["backend"] = next(
        (line for line in log_text.splitlines() if "attention backend" in line), ""
    )
    return row


def table(rows: list[dict[str, Any]], header: str) -> str:
    names = (
        "| length | SP | mode | tokens/s a GPU | peak GiB | losses | largest relative difference to"
        " SP=1 |"
    )
    out = [header, "", names, "|" + "---|" * 7]
    base = {r["length"]: r["losses"] for r in rows if r["sp"] == 1}
    for r in rows:
        if "error" in r:
            out.append(
                f"| {r['length']} | {r['sp']} | {r['mode']} | failed:"
                f" {r['error'].strip().splitlines()[-1][:120]} | | | |"
            )
            continue
        same = base.get(r["length"], [])
        far = [abs(a - b) / abs(b) for a, b in zip(r["losses"], same, strict=False)]
        difference = worst(far) if far else float("nan")
        losses = ", ".join(f"{x:.4f}" for x in r["losses"])
        numbers = [
            f"{r['length']:,}",
            r["sp"],
            r["mode"],
            r.get("tokens_per_s_gpu"),
            r.get("peak_gib"),
            losses,
            f"{difference:.1e}",
        ]
        out.append("| " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--shape", default="qwen2.5-7b")
    runs = [
        "65536:1:-:5",
        "65536:2:zigzag-ring:5",
        "65536:2:ulysses:5",
        "32768:1:-:4",
        "32768:2:zigzag-ring:4",
    ]
    parser.add_argument("--runs", nargs="*", default=runs, help="length:sp:mode:steps")
    parser.add_argument("--world", type=int, default=2)
    args, extra = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        model = make_model(args.shape, folder / "model")
        parsed = [r.split(":") for r in args.runs]
        longest = max(int(r[0]) for r in parsed)
        make_data(folder / "data", args.world * max(int(r[3]) for r in parsed), longest * 3)
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        import transformers

        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        header = f"{args.shape} shape, random weights, {args.world} x {gpu}, {versions}"
        for length, size, mode, steps in parsed:
            mode = "zigzag-ring" if mode == "-" else mode
            row = run(
                model,
                folder / "data",
                folder / "out",
                int(length),
                int(size),
                mode,
                args.world,
                int(steps),
                extra,
            )
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "sp_training.json").write_text(
                json.dumps({"header": header, "rows": rows}, indent=1)
            )
            (args.out / "sp_training.md").write_text(table(rows, header))
    print(table(rows, header))


if __name__ == "__main__":
    main()
