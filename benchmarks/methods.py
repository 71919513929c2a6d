"""Optimizers and adapters of docs/methods.md on GPUs: seconds of a step, memory, and whether two
devices that share each row do what one does.

    python benchmarks/methods.py --out benchmarks/results

A decoder of 0.4 billion parameters with random weights learns random tokens for a few steps, on one
GPU and on two (FSDP2, sequence parallel), by `longfactory train`. A row that fails is recorded, and
the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"use_muon": True},
    "badam": {"use_badam": True, "badam_switch_interval": 2},
    "adamw, pure_bf16": {"pure_bf16": True, "bf16": None},
    "badam, pure_bf16": {"use_badam": True, "pure_bf16": True, "bf16": None},
    "oft": {"finetuning_type": "oft", "oft_block_size": 32},
    "galore": {"use_galore": True, "galore_rank": 128, "sharding": "ddp"},
    "apollo": {"use_apollo": True, "apollo_rank": 128, "sharding": "ddp"},
}
STEPS = 6
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}


def write_inputs(folder: Path, tokens: int, shape: dict[str, Any]) -> None:
    """A model with a tokenizer of bytes, and rows of `tokens` random ids."""
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from small_runs import write_tokenizer

    size = write_tokenizer(folder / "model")
    config = transformers.LlamaConfig(**shape, vocab_size=size)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(2 * STEPS):
            ids = [draw.randrange(3, size) for _ in range(tokens)]
            file.write(json.dumps({"input_ids": ids, "mask": [0] + [1] * (tokens - 1)}) + "\n")


def run(folder: Path, keys: dict[str, Any], gpus: int, limit: float) -> dict[str, Any]:
    """One run of the command; what its files say of it."""
    out = folder / "out"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    given = {
        "model_name_or_path": folder / "model",
        "stage": "rl",
        "rl_loss": "nll",
        "dataset": folder / "rows.jsonl",
        "finetuning_type": "full",
        "cutoff_len": 10**6,
        "output_dir": out,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_final_model": False,
        "disable_shuffling": True,
        "report_to": "none",
        "bf16": True,
        "sharding": "fsdp2" if gpus > 1 else "auto",
        "sequence_parallel_size": gpus,
        "nproc_per_node": gpus,
        "skip_memory_metrics": False,
        **keys,
    }
    words = [f"{k}={v}" for k, v in given.items() if v is not None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:gpus]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible)}
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and keys.get("use_cpu"):
        environment.pop("CUDA_VISIBLE_DEVICES")
    done = subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "train", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    seconds = [line["seconds_per_step"] for line in log if "seconds_per_step" in line]
    peak = [line["peak_memory_gib"] for line in log if "peak_memory_gib" in line]
    return {
        "losses": [h["loss"] for h in history if "loss" in h],
        "norms": [h["grad_norm"] for h in history if "grad_norm" in h],
        "seconds": min(seconds, default=None),
        "peak_gib": max(peak, default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--limit", type=float, default=170, help="seconds of all rows")
    parser.add_argument("--cpu", action="store_true", help="a tiny model: to try the script")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    results: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    shape, tokens = SHAPE, args.tokens
    if args.cpu:
        more = {"use_cpu": True, "sharding": "ddp"}
        shape = {**SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        tokens = 96
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, tokens, shape)
        print(f"{'row':<18} {'GPUs':>4} {'s/step':>8} {'GiB':>7}  losses", flush=True)
        for name in args.rows:
            for gpus in (1, 2):
                left = end - time.monotonic()
                found: dict[str, Any] = {"row": name, "gpus": gpus, "tokens": tokens}
                try:
                    if left < 10:
                        raise RuntimeError("no time was left")
                    found |= run(folder, {**ROWS[name], **more}, gpus, left)
                except (RuntimeError, subprocess.TimeoutExpired, OSError, KeyError) as error:
                    found["error"] = str(error)[:300]
                results.append(found)
                shown = found.get("error") or " ".join(f"{x:.4f}" for x in found["losses"])
                numbers = [found.get("seconds"), found.get("peak_gib")]
                text = [f"{x:.2f}" if x is not None else "-" for x in numbers]
                print(f"{name:<18} {gpus:>4} {text[0]:>8} {text[1]:>7}  {shown}", flush=True)
    path = Path(args.out) / "methods.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Written: {path}", flush=True)


if __name__ == "__main__":
    main()
