"""The part `length` of `many_gpus.py`: the longest rows."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

from _many_commands import (
    Job,
    in_one_group,
    train,
    workplace,
)
from _many_models import model_folder, on_gpus
from _many_table import Row, earlier, keep, wanted
from plan_accuracy import DPO, FULL, LORA, SFT


class Long(NamedTuple):
    """One row of the part `length`. `layers`: of the shape's, None for all. Of two steps the second
    counts; a row of one step is timed with what its first step builds and pins.
    """

    shape: str
    layers: int | None
    tokens: int
    keys: Row
    steps: int = 2
    mode: str = "auto"


MILLION = Long("qwen2.5-7b", None, 1 << 20, SFT | FULL, 1, "zigzag-ring")


LONG: dict[str, Long] = {
    "7B, 1,048,576 tokens, full SFT": MILLION,
    "Qwen3-30B-A3B, 131,072 tokens, full SFT": Long("qwen3-30b-a3b", None, 131072, SFT | FULL),
    "14B, 4 of 48 layers, 524,288 tokens, full SFT": Long("qwen2.5-14b", 4, 1 << 19, SFT | FULL),
    "Qwen3-30B-A3B, 4 of 48 layers, 524,288 tokens, LoRA SFT": Long(
        "qwen3-30b-a3b", 4, 1 << 19, SFT | LORA
    ),
    "7B, 2 of 28 layers, 786,432 tokens, full DPO pair": Long("qwen2.5-7b", 2, 786432, DPO | FULL),
    "7B, 4 of 28 layers, 1,048,576 tokens, full SFT": Long("qwen2.5-7b", 4, 1 << 20, SFT | FULL),
    "14B, 524,288 tokens, full SFT": Long("qwen2.5-14b", None, 1 << 19, SFT | FULL, 1),
    "7B, 786,432 tokens, full DPO pair": Long("qwen2.5-7b", None, 786432, DPO | FULL, 1),
    "Qwen3-30B-A3B, 524,288 tokens, LoRA SFT": Long("qwen3-30b-a3b", None, 1 << 19, SFT | LORA, 1),
}
"""By value. A whole model's step of half a million tokens or more takes minutes, so that further rows
have some of its layers."""


WIDE: dict[str, Long] = {
    "7B, 1,572,864 tokens, full SFT": Long(
        "qwen2.5-7b", None, 1572864, SFT | FULL, 1, "zigzag-ring"
    ),
    "14B, 983,040 tokens, full SFT": Long(
        "qwen2.5-14b", None, 983040, SFT | FULL, 1, "zigzag-ring"
    ),
    "7B, 786,432 tokens, full DPO pair": Long("qwen2.5-7b", None, 786432, DPO | FULL, 1),
    "7B, 2 of 28 layers, 2,097,152 tokens, full SFT": Long("qwen2.5-7b", 2, 1 << 21, SFT | FULL),
    "14B, 2 of 48 layers, 1,310,720 tokens, full SFT": Long("qwen2.5-14b", 2, 1310720, SFT | FULL),
    "Qwen3-8B, 1,048,576 tokens, full SFT": Long("qwen3-8b", None, 1 << 20, SFT | FULL, 1),
    "Llama-3-8B, 1,048,576 tokens, full SFT": Long("llama-3-8b", None, 1 << 20, SFT | FULL, 1),
    "Qwen3-30B-A3B, 131,072 tokens, full SFT": Long("qwen3-30b-a3b", None, 131072, SFT | FULL),
    "Qwen3-30B-A3B, 1,048,576 tokens, full SFT": Long(
        "qwen3-30b-a3b", None, 1 << 20, SFT | FULL, 1
    ),
    "7B, 2 of 28 layers, 5,242,880 tokens, full SFT": Long(
        "qwen2.5-7b", 2, 5 << 20, SFT | FULL, 1, "zigzag-ring"
    ),
}
"""The rows of eight GPUs. Whole models as far as a command of 10 minutes holds their step: the plan of eight H200
says 590 s for 1,835,008 tokens of the 7B, to which its start comes, and 604 s for 1,179,648 of the 14B."""


def length(a: argparse.Namespace) -> int:
    """Whole models of one step by the command, one after another; for all others Python starts once."""
    rows, failed = earlier(a), False
    table = WIDE if a.gpus_asked_for >= 8 else LONG
    left = {name: at for name, at in table.items() if wanted(a, name)}
    if a.small:
        kinds = {f"{at.shape} {at.keys}": name for name, at in left.items()}
        tokens = 1024 if a.smoke else 128
        left = {
            name: at._replace(layers=1, tokens=at.tokens // tokens)
            for name, at in left.items()
            if name in kinds.values()
        }

    def tell(name: str, row: Row) -> None:
        nonlocal failed
        at = left.pop(name)
        if "first step s" in row:
            seconds = row.get("step s", row["first step s"])
            row["tokens/s a GPU"] = (row["tokens"] or at.tokens) / seconds / a.gpus
        failed |= "error" in row
        keep(a, {"row": name, **row}, rows)

    while left and a.end - time.time() > 30:
        with workplace() as home:
            name, at = next(iter(left.items()))
            if at.steps == 1:
                keys = long_keys(a, home / "one", at)
                tell(name, train(home, "one", range(a.gpus), keys, a.end - time.time()))
                continue
            jobs = [
                Job(name, long_keys(a, home / str(i), at))
                for i, (name, at) in enumerate(left.items())
                if at.steps > 1
            ]
            in_one_group(home, range(a.gpus), jobs, a.end - 5, tell, a.after)
    for name in list(left):
        tell(name, {"error": "not started: the time of this command was up"})
    return int(failed)


LENGTH_NOTE = (
    "Through `longfactory train`, random weights, nothing saved, FSDP2, bf16 with fp32 master"
    " weights, memory: auto. Where a row has one step, its seconds are those of the first, with"
    " everything that it builds and pins. A pair of DPO: 95 % of its tokens are the prompt that both"
    " answers share; the reference's log-probabilities are computed before the steps."
)


def long_keys(a: argparse.Namespace, home: Path, at: Long) -> Row:
    """Writes model and data; the run's keys."""
    model = model_folder(a, home / "model", at.shape, at.layers)
    stage = at.keys["stage"]
    make_long(home / "data", at.tokens, at.steps, pairs=stage == "dpo")
    return {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "dataset_dir": home / "data",
        "cutoff_len": at.tokens,
        "sequence_parallel_size": a.gpus,
        "sequence_parallel_mode": at.mode,
        "gradient_accumulation_steps": 1,
        "max_steps": at.steps,
        **on_gpus(a, a.gpus),
        **at.keys,
        **({"precompute_ref_log_probs": "true"} if stage == "dpo" else {}),
    }


def make_long(folder: Path, tokens: int, rows: int, pairs: bool) -> None:
    """Samples that a tokenizer of bytes makes `tokens` tokens of, nearly: one answer, or a pair of
    short answers to a long prompt.
    """
    import pydoc_data.topics

    text = "\n\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    text *= tokens // len(text) + 1
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, str]] = []
    for i in range(rows):
        if pairs:
            answer = tokens // 40
            prompt = text[: tokens - 2 * answer - 64]
            samples.append(
                {
                    "instruction": f"{i} {prompt}",
                    "chosen": text[:answer],
                    "rejected": text[answer : 2 * answer],
                }
            )
        else:
            samples.append({"instruction": f"Part {i}.", "output": text[:tokens]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info: Row = {"answers": {"file_name": "samples.jsonl"}}
    info["pairs"] = {"file_name": "samples.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
