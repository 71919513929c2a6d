"""What `longfactory verify` says of healthy runs and of planted faults.

    python benchmarks/verify_faults.py --write benchmarks/results/verify_faults.md

Healthy runs: stages x sequence_parallel_size x packing x LoRA x model families x precisions, tiny
models on a CPU; none may raise an alarm. Then each fault of tests/helpers/planted.py in a run that
shows it: it must be found, with a sentence that names it, and what it follows is said.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from longfactory.testing import run_ranks  # noqa: E402


def with_family(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`family`: a tiny model of that family; `spread`: standard deviation of its weights (0.02:
    routers are nearly undecided).
    """
    keys = {**base, **{k: v for k, v in changes.items() if k not in ("family", "spread")}}
    if "family" in changes:
        from verify_ratios import make_folder

        spread = changes.get("spread", 0.02)
        folder = Path(base["model_name_or_path"]).parent / f"{changes['family']}-{spread}"
        keys["model_name_or_path"] = str(
            folder if folder.exists() else make_folder(folder, changes["family"], spread)
        )
    return keys


def healthy() -> Iterator[tuple[int, dict[str, Any]]]:
    """(processes, keys): every stage in float32 and bf16 at SP 1 and 2, then methods, families,
    schedules.
    """
    from verify_ratios import STAGES

    for stage in STAGES.values():
        yield 1, {**stage, "sequence_parallel_size": 1, "bf16": True}
        yield 2, stage
        yield 2, {**stage, "bf16": True}
    for family in ("qwen3_moe", "gpt_oss", "mixtral", "gemma2", "mistral", "phi3"):
        yield 2, {"family": family, "spread": 0.15, "bf16": True, "pure_bf16": True}
        yield (
            2,
            {
                "family": family,
                "bf16": True,
                "finetuning_type": "lora",
                "stage": "dpo",
                "dataset": "manual_dpo",
            },
        )
    yield 2, {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "bf16": True}
    yield 2, {"finetuning_type": "lora", "stage": "kto", "dataset": "manual_kto", "use_dora": True}
    yield (
        2,
        {
            "finetuning_type": "lora",
            "stage": "dpo",
            "dataset": "manual_dpo",
            "ld_alpha": 0.3,
            "pref_loss": "ipo",
        },
    )
    yield 2, {"finetuning_type": "lora", "additional_target": "embed_tokens,lm_head", "bf16": True}
    yield 2, {"sequence_parallel_mode": "ulysses", "packing": True, "bf16": True}
    yield 2, {"sequence_parallel_mode": "llama3", "per_device_train_batch_size": 1}
    yield 2, {"train_on_prompt": True, "gradient_accumulation_steps": 3, "neftune_noise_alpha": 5.0}
    yield 2, {"streaming": True, "max_steps": 5, "max_samples": None}
    yield 4, {"bf16": True}
    yield 4, {"stage": "dpo", "dataset": "manual_dpo", "pref_loss": "kto_pair"}
    yield 4, {"stage": "kto", "dataset": "manual_kto", "sequence_parallel_size": 2}


def told(changes: dict[str, Any]) -> str:
    """The keys of a run in a few words."""
    short = {
        "stage": "",
        "dataset": None,
        "finetuning_type": "",
        "sequence_parallel_size": "SP ",
        "family": "",
        "spread": None,
        "verify_tokens": None,
    }
    words = []
    for key, value in changes.items():
        prefix = short.get(key, f"{key} ")
        if prefix is None or (key == "max_samples" and value is None):
            continue
        words.append(key if value is True else f"{prefix}{value}")
    return ", ".join(words) or "as it is"


def lines_of(said: str) -> dict[str, Any]:
    """What a report says is wrong, and what the difference follows."""
    lines = re.sub(r"\S*/longfactory-verify-\w+", "FOLDER", said).splitlines()
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    follows = [line for line in lines if line.startswith(("The difference ", "No part of the run"))]
    return {"reasons": reasons, "follows": follows[0] if follows else ""}


def rows_of(base: dict[str, Any], only: str) -> Iterator[dict[str, Any]]:
    """One row a run, as it ends."""
    from planted import FOUND, FOUND_FURTHER, verified_with, with_keys

    runs: list[tuple[str, int, dict[str, Any], str]] = []
    if only != "faults":
        runs += [("", processes, changes, "") for processes, changes in healthy()]
    if only != "healthy":
        runs += [(fault, 2, changes, words) for fault, (words, changes) in FOUND.items()]
    for fault, processes, changes, words in runs:
        keys = with_keys(base, changes) if fault else with_family(base, changes)
        started = time.monotonic()
        row: dict[str, Any] = {
            "fault": fault,
            "processes": processes,
            "changes": changes,
            "run": told({"sequence_parallel_size": 2, **changes}),
            "further": fault in FOUND_FURTHER,
        }
        try:
            exact, said = run_ranks(
                processes, verified_with, keys, fault, bool(fault), timeout=900
            )[0]
            named = not words or words in said
            if not fault and not exact:
                row["said"] = said
            row |= {"exact": exact, "named": named, **lines_of(said)}
            if not row["reasons"] and fault:
                row["reasons"] = [said.splitlines()[0]]
        except Exception as error:  # a run that is refused is a row too
            row["error"] = str(error).strip().splitlines()[-1][:300]
        yield {**row, "seconds": round(time.monotonic() - started, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """The page."""
    import torch
    import transformers

    good = [row for row in rows if not row["fault"]]
    bad = [row for row in rows if row["fault"]]
    alarms = [row for row in good if not row.get("exact")]
    missed = [row for row in bad if row.get("exact", True)]
    unnamed = [row for row in bad if not row.get("named")]
    lines = [
        "# What `longfactory verify` finds",
        "",
        (
            f"Written by `benchmarks/verify_faults.py` with torch {torch.__version__}, transformers"
            f" {transformers.__version__}, on a CPU: {len(good)} healthy runs, {len(alarms)} alarms;"
            f" {len(bad)} planted faults, {len(missed)} missed, {len(unnamed)} found without the"
            " sentence that names them."
        ),
        "",
        "| planted fault | run | what is said first | what it follows |",
        "|---|---|---|---|",
    ]
    for row in bad:
        said = row.get("error") or (row["reasons"] or ["nothing"])[0]
        state = " **not named**" if row in unnamed else ""
        if row in missed:
            state = " **missed**"
        cells = (row["fault"] + state, row["run"], said, row.get("follows", ""))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    lines += [
        "",
        f"The last {sum(row['further'] for row in bad)} were planned from the code that trains,"
        " without a look at how `verify` works.",
        "",
        "| healthy run | processes | |",
        "|---|---|---|",
    ]
    for row in good:
        state = "the same" if row.get("exact") else row.get("error", "ALARM")
        lines.append(f"| {row['run']} | {row['processes']} | {state} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="the page, with its numbers beside it as .json")
    parser.add_argument("--only", choices=("healthy", "faults", ""), default="")
    options = parser.parse_args()
    from manual_runs import manual_sft

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = manual_sft(Path(scratch))
        for row in rows_of(base, options.only):
            rows.append(row)
            print(json.dumps({k: row.get(k) for k in ("fault", "run", "exact", "named", "error", "seconds")}), flush=True)  # fmt: skip
            if options.write:
                options.write.write_text(table(rows))
                options.write.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    failed = [
        row
        for row in rows
        if row.get("exact", bool(row["fault"])) == bool(row["fault"]) or not row.get("named")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
