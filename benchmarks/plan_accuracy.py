"""What the memory plan predicts of a run beside what the run took, through `longfactory train` on
the GPUs of one machine.

    python benchmarks/plan_accuracy.py --gpus 1 --out benchmarks/results
    python benchmarks/plan_accuracy.py --gpus 2 --only 7b-full-32k moe-full-16k --out benchmarks/results

Each setting is a run of a few steps with random weights, whose log holds the plan that it made
before it loaded anything (`longfactory plan` prints the same). Predicted are the peak of one GPU and
the seconds of a step; measured are the most bytes that torch had allocated, and the mean of the
steps after the first. Nothing is left out: a setting that fails is in the table with its last
line. With `--out`, earlier settings stay in the table unless they are run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _table import command_line, machine_name  # noqa: E402
from make_model import QWEN, SHAPES, make_model  # noqa: E402
from sp_training import make_data  # noqa: E402

FURTHER: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": QWEN
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
FULL: dict[str, Any] = {"stage": "pt", "finetuning_type": "full"}
LORA: dict[str, Any] = {"stage": "pt", "finetuning_type": "lora", "lora_rank": 8}
SETTINGS: dict[str, tuple[str, int | None, int, dict[str, Any]]] = {
    # name: shape, layers (None: all), tokens, keys
    "1.5b-full-16k": ("qwen2.5-1.5b", None, 16384, FULL),
    "1.5b-full-64k": ("qwen2.5-1.5b", None, 65536, FULL),
    "7b-full-16k": ("qwen2.5-7b", None, 16384, FULL),
    "7b-full-32k": ("qwen2.5-7b", None, 32768, FULL),
    "7b-lora-32k": ("qwen2.5-7b", None, 32768, LORA),
    "7b-full-host-16k": ("qwen2.5-7b", None, 16384, FULL | {"optimizer_placement": "host"}),
    "7b-12-layers-full-64k": ("qwen2.5-7b", 12, 65536, FULL),
    "moe-6-layers-full-16k": ("qwen3-30b-a3b", 6, 16384, FULL),
    "moe-6-layers-lora-32k": ("qwen3-30b-a3b", 6, 32768, LORA),
}


def write_shape(shape: str, layers: int | None, folder: Path) -> Path:
    """A model folder of a shape, with another number of layers if asked."""
    make_model(shape if shape in SHAPES else "qwen2.5-7b", folder)
    config = dict(SHAPES.get(shape) or FURTHER[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def run(name: str, gpus: int, steps: int, home: Path) -> dict[str, Any]:
    """One setting: what was predicted and what was measured."""
    shape, layers, tokens, changes = SETTINGS[name]
    keys = {
        "model_name_or_path": write_shape(shape, layers, home / f"model-{shape}-{layers}"),
        "train_from_scratch": "true",
        "dataset": "long",
        "dataset_dir": home / "data",
        "cutoff_len": tokens,
        "packing": "false",
        "sequence_parallel_size": gpus,
        "nproc_per_node": gpus,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": "1e-5",
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": home / f"out-{name}",
        "overwrite_output_dir": "true",
        "include_num_input_tokens_seen": "true",
        "report_to": "none",
        "save_final_model": "false",
        "bf16": "true",
        **({"sharding": "fsdp2"} if gpus > 1 else {}),
        **changes,
    }
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    command += [f"{key}={value}" for key, value in keys.items()]
    env = {**os.environ, "RECORD_VRAM": "1", "LONGFACTORY_CACHE": str(home / "cache")}
    begun = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    text = done.stdout + done.stderr
    row: dict[str, Any] = {
        "name": name,
        "gpus": gpus,
        "shape": shape,
        "layers": layers,
        "tokens": tokens,
        "keys": changes,
        "seconds_in_all": round(time.time() - begun),
    }
    if done.returncode:
        last = [line for line in text.splitlines() if line.strip()]
        return {**row, "error": last[-1][:300] if last else "no output", "log": text[-4000:]}
    total = re.search(r"^ +total +([0-9.]+) +of", text, re.MULTILINE)
    step = re.search(r"predicted: ([0-9.]+) s a row", text)
    plan = re.search(r"Memory plan.*\n +(.*)", text)
    logged = (home / f"out-{name}" / "trainer_log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in logged if '"loss"' in line]
    assert total is not None and step is not None and plan is not None
    seconds = (lines[-1]["elapsed_seconds"] - lines[0]["elapsed_seconds"]) / (len(lines) - 1)
    return {
        **row,
        "predicted_gib": float(total[1]),
        "predicted_seconds": float(step[1]),
        "peak_gib": max(line["vram_allocated"] for line in lines),
        "step_seconds": seconds,
        "settings": plan[1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | GPUs | predicted GiB | peak GiB | off | predicted s | step s | off |"
        " settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['name']} | {r['gpus']} | failed: {r['error']} | | | | | | |")
            continue
        memory, time_off = (
            r[f"predicted_{what}"] / r[got] - 1
            for what, got in (("gib", "peak_gib"), ("seconds", "step_seconds"))
        )
        lines.append(
            f"| {r['name']} | {r['gpus']} | {r['predicted_gib']:.1f} | {r['peak_gib']:.1f} |"
            f" {memory:+.0%} | {r['predicted_seconds']:.1f} | {r['step_seconds']:.2f} |"
            f" {time_off:+.0%} | {r['settings']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=500, help="no setting begins later")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    end = time.time() + args.limit
    import torch
    import transformers

    about = {
        "machine": f"{args.gpus} x {machine_name()}",
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    rows: list[dict[str, Any]] = []
    path = None if args.out is None else args.out / "plan_accuracy.json"
    if path is not None and path.is_file():
        rows = json.loads(path.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_data(home / "data", 2 * args.gpus, 3 * max(SETTINGS[n][2] for n in args.only))
        for name in args.only:
            if time.time() > end:
                print(f"{name}: not started, the time of this command is up", flush=True)
                continue
            row = {**run(name, args.gpus, args.steps, home), **about}
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if (r["name"], r["gpus"]) != (name, args.gpus)] + [row]
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                made = dict.fromkeys(
                    f"`{r['command']}` ({r['date']}, {r['machine']}, {r['versions']})" for r in rows
                )
                text = "# The plan and the run\n\n" + table(rows) + "\n" + "\n".join(made) + "\n"
                path.with_suffix(".md").write_text(text)
    print(table(rows))
    return int(any("error" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
