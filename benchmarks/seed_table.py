"""The longest sequences that 360-LLaMA-Factory publishes beside those that LongFactory's plan
predicts for the same models, stages and GPUs.

    python benchmarks/seed_table.py --out benchmarks/results

Published: https://github.com/Qihoo360/360-LLaMA-Factory, its README, "SFT Max Length" and "DPO Max
Length": Qwen2.5 on A800 of 80 GB, full parameters, with ZeRO-3 offload and gradient checkpointing.
Predicted, at the same sequence_parallel_size: bf16, FSDP2, AdamW with exact fp32 masters, 1024 GiB of
memory on each host of eight GPUs, the links of the data sheet; `longfactory plan` on such a run prints
the same. A DPO row holds both answers of a pair, each of the length in the table. Nothing here was run.

Beside the 7B's rows stands what its growth of memory with length, measured on two H200 at up to
2,097,152 tokens (`length.py --probe`), gives at that length: bytes of a local token that a layer
works in, and what the last layers leave on the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
from _table import command_line  # noqa: E402
from longfactory.config import load_config  # noqa: E402
from longfactory.memory.shapes import machine  # noqa: E402
from longfactory.model import load  # noqa: E402
from longfactory.plan.facts import duration  # noqa: E402
from longfactory.plan.sizes import model_folder  # noqa: E402
from longfactory.train.auto import Planned, longest_row, way  # noqa: E402
from longfactory.train.memory_plan import count_parameters  # noqa: E402

GiB = 2**30
PUBLISHED = (
    # size of the model, A800, stage, sequence_parallel_size, tokens
    ("7b", 8, "sft", 8, 210_000),
    ("14b", 8, "sft", 8, 175_000),
    ("72b", 32, "sft", 8, 128_000),
    ("7b", 8, "dpo", 4, 32_000),
    ("7b", 8, "dpo", 8, 84_000),
    ("14b", 8, "dpo", 4, 32_000),
    ("14b", 8, "dpo", 8, 72_000),
    ("72b", 32, "dpo", 8, 46_000),
    ("72b", 32, "dpo", 16, 86_000),
)
LIMIT = 600.0  # seconds of a step that is still of use


def planned(folder: str, gpus: int, stage: str, size: int) -> Planned:
    keys = {
        "model_name_or_path": folder,
        "stage": stage,
        "finetuning_type": "full",
        "template": "empty",
        "dataset": "not_given",
        "output_dir": "not_given",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "bf16": "true",
        "sequence_parallel_size": size,
    }
    cfg = load_config([*(f"{name}={value}" for name, value in keys.items()), "--dry_run"])
    config = load.load_config(cfg.model, 0)
    where = machine("A800", gpus, 1024 * GiB, gpus_per_host=8)
    return Planned(cfg, config, count_parameters(cfg, config), "fsdp2", where)


def slope() -> float:
    """Bytes of GPU memory a local token of the 7B's shape, measured between two lengths."""
    page = json.loads((ROOT / "benchmarks/results/probe_2xH200_7b.json").read_text())
    first, last = sorted(page["results"], key=lambda r: r["tokens"])[:: len(page["results"]) - 1]
    more = (last["tokens"] - first["tokens"]) / page["gpus"]
    return float((last["peak"] - first["peak"]) / more)


def within(run: Planned, size: int, longest: int) -> int:
    """Tokens of the longest row whose step takes no more than `LIMIT`."""
    low, high = 0, longest // 8192
    while high - low > 1:
        middle = (low + high) // 2
        found = way(run, middle * 8192, size)
        low, high = (middle, high) if found.step <= LIMIT else (low, middle)
    return low * 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    lines = [
        "# The lengths that 360-LLaMA-Factory publishes, and the plan",
        "",
        "Published: [its README](https://github.com/Qihoo360/360-LLaMA-Factory), Qwen2.5, full parameters,"
        " A800 of 80 GB. Predicted by `longfactory plan`'s code for the same GPUs, eight to a host of 1024 GiB: bf16,"
        " FSDP2, AdamW with exact fp32 masters, `memory: auto`. Nothing of it was run. Lengths are tokens of"
        " a sequence; a DPO row holds both answers of a pair.",
        "",
        "| model | A800 | stage | SP | published | there, predicted: a step, peak a GPU |"
        f" longest whose step takes {LIMIT:.0f} s | longest that fits, and its step |"
        " by the measured slope, GiB a GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    per_token = slope()
    for model, gpus, stage, size, tokens in PUBLISHED:
        with model_folder(model) as folder:
            run = planned(folder, gpus, stage, size)
        there = way(run, tokens * run.documents, size)
        longest = longest_row(run, size)
        far = way(run, longest, size)
        soon = within(run, size, longest) // run.documents
        peak = there.memory.plan.budget.gpu_total / GiB
        lines.append(
            f"| {model.upper()} | {gpus} | {stage} | {size} | {tokens:,} | {duration(there.step)},"
            f" {peak:.1f} GiB | {soon:,} | {longest // run.documents:,}, {duration(far.step)} |"
            f" {f'{per_token * tokens * run.documents / size / GiB:.2f}' if model == '7b' else ''} |"
        )
        print(lines[-1], flush=True)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    note = (
        f"Last column: {per_token:,.0f} bytes a local token, which two layers of the 7B's shape took on"
        " two H200 from 524,288 to 2,097,152 tokens (probe_2xH200_7b.md), at the published length:"
        " the part of the peak that grows with it when all that can leave the GPU does."
    )
    text = "\n".join([*lines, "", note, "", f"`{command_line()}` ({day})"]) + "\n"
    if a.out is not None:
        (a.out / "seed_table.md").write_text(text)


if __name__ == "__main__":
    main()
