"""Optimizers and adapters of docs/methods.md on one GPU: seconds of a step, memory, losses; with
`--gpus 1 2` also whether two devices that share each row do what one does.

    python benchmarks/methods.py --out benchmarks/results

A decoder of 0.5 billion parameters with random weights, made on the device, learns random tokens for
a few steps. Rows of one GPU are runs of `longfactory train` in this process, one after another, so
that Python and its packages start once; rows of two are commands. A row that fails is recorded, and
the next one runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _log import step_seconds

ROWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"use_muon": True},
    "badam": {"use_badam": True, "badam_switch_interval": 2},
    "adamw, pure_bf16": {"pure_bf16": True, "bf16": None},
    "badam, pure_bf16": {"use_badam": True, "pure_bf16": True, "bf16": None},
    "oft": {"finetuning_type": "oft", "oft_block_size": 32},
    "lora": {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all"},
    "fp8": {"fp8": True},
    "galore": {"use_galore": True, "galore_rank": 128, "sharding": "ddp"},
    "apollo": {"use_apollo": True, "apollo_rank": 128, "sharding": "ddp"},
    "adam-mini": {"use_adam_mini": True, "sharding": "ddp"},
}
STEPS = 6
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}


def write_inputs(folder: Path, tokens: int, shape: dict[str, Any]) -> None:
    """A model's configuration with a tokenizer of bytes, and rows of `tokens` random ids."""
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from small_runs import write_tokenizer

    size = write_tokenizer(folder / "model")
    config = transformers.LlamaConfig(**shape, vocab_size=size)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(STEPS):
            ids = [draw.randrange(3, size) for _ in range(tokens)]
            file.write(json.dumps({"input_ids": ids, "mask": [0] + [1] * (tokens - 1)}) + "\n")


def words(folder: Path, keys: dict[str, Any], gpus: int) -> list[str]:
    """The run's keys and values."""
    given = {
        "model_name_or_path": folder / "model",
        "train_from_scratch": True,
        "stage": "rl",
        "rl_loss": "nll",
        "dataset": folder / "rows.jsonl",
        "finetuning_type": "full",
        "cutoff_len": 10**6,
        "output_dir": folder / "out",
        "overwrite_output_dir": True,
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
        **keys,
    }
    return [f"{k}={v}" for k, v in given.items() if v is not None]


def in_this_process(argv: list[str]) -> None:
    """A run on one device."""
    import torch

    from longfactory.config import load_config
    from longfactory.train.run import run

    try:
        run(load_config(argv))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def as_command(argv: list[str], gpus: int, limit: float) -> None:
    """A run on several devices.

    Raises:
        RuntimeError: it failed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:gpus]
    done = subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "train", *argv],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible)},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:200])


def read_out(out: Path) -> dict[str, Any]:
    """What a run's files say of it."""
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    peak = [line["peak_memory_gib"] for line in log if "peak_memory_gib" in line]
    return {
        "losses": [line["loss"] for line in log if "loss" in line],
        "norms": [line["grad_norm"] for line in log if "grad_norm" in line],
        "seconds": min(step_seconds(log), default=None),
        "peak_gib": max(peak, default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--gpus", type=int, nargs="*", default=[1])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--limit", type=float, default=150, help="seconds of all rows")
    parser.add_argument("--cpu", action="store_true", help="a tiny model: to try the script")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    results: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    shape, tokens = SHAPE, args.tokens
    if args.cpu:
        more = {"use_cpu": True, "sharding": "auto"}
        shape = {**SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        tokens = 96
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, tokens, shape)
        print(
            f"{'row':<28} {'GPUs':>4} {'s/step':>8} {'GiB':>7} {'s whole':>8}  losses", flush=True
        )
        for name in args.rows:
            for gpus in args.gpus:
                left, start = end - time.monotonic(), time.monotonic()
                found: dict[str, Any] = {"row": name, "gpus": gpus, "tokens": tokens}
                try:
                    if left < 10:
                        raise RuntimeError("no time was left")
                    argv = words(folder, {**ROWS[name], **more}, gpus)
                    if gpus == 1:
                        in_this_process(argv)
                    else:
                        as_command(argv, gpus, left)
                    found |= read_out(folder / "out")
                except Exception as error:  # a row that fails is recorded
                    found["error"] = f"{type(error).__name__}: {error}"[:300]
                found["whole"] = time.monotonic() - start
                results.append(found)
                shown = found.get("error") or " ".join(f"{x:.4f}" for x in found["losses"])
                numbers = [found.get(x) for x in ("seconds", "peak_gib", "whole")]
                text = [f"{x:.2f}" if x is not None else "-" for x in numbers]
                columns = f"{text[0]:>8} {text[1]:>7} {text[2]:>8}"
                print(f"{name:<28} {gpus:>4} {columns}  {shown}", flush=True)
    path = Path(args.out) / "methods.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Written: {path}", flush=True)


if __name__ == "__main__":
    main()
