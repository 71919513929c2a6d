"""A key, the data or the processes changed between a run and its continuation: what alters samples
or cannot be loaded is refused with the cause; what a user may want is applied and told; the rest ends
as the uninterrupted run, and with other processes within 1e-6.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _survival_runs as runs
from longfactory.sp.distance import worst

TOLERANCE = 1e-6
AT = 2
"""The checkpoint's step: in the middle of an epoch, and between two rows of the log."""

Change = tuple[str, str, dict[str, Any], str, Any]
# what is changed, run, keys, how it ends, words of the log (or, where applied, a function of rows)
ONE_MORE = {"sequence_parallel_size": 2}
CHANGES: list[Change] = [
    ("nothing", "sft", {}, "equal", ""),
    ("nothing", "lora dropout", {}, "equal", ""),
    ("nothing", "packing", {}, "equal", ""),
    ("nothing", "streaming", {}, "equal", ""),
    ("nothing", "sp2", {}, "equal", ""),
    ("nothing", "ddp2 lora dropout", {}, "equal", ""),
    ("a letter of a row", "sft", {"edit": "talks"}, "refused", "other training data"),
    ("a letter of a row", "packing", {"edit": "more"}, "refused", "other training data"),
    ("a letter of a row", "streaming", {"edit": "talks"}, "refused", "other training data"),
    ("the folder of the data", "sft", {"edit": ""}, "equal", ""),
    ("a row more", "sft", {"edit": "+talks"}, "refused", "samples = "),
    ("cutoff_len, where it cuts", "sft", {"cutoff_len": 40}, "refused", "cutoff_len: 96 -> 40"),
    ("cutoff_len, where it cuts nothing", "sft", {"cutoff_len": 200}, "applied", "cutoff_len: 96"),
    ("template", "sft", {"template": "default"}, "another run", "its template is chatml"),
    ("seed", "sft", {"seed": 7}, "refused", "seed"),
    ("data_seed", "packing", {"data_seed": 7}, "refused", "data_seed = 42, this run has 7"),
    ("samples of a step", "sft", {"gradient_accumulation_steps": 3}, "refused", "2 samples an"),
    ("shuffling", "packing", {"disable_shuffling": True}, "refused", "shuffle = True"),
    ("train_on_prompt", "sft", {"train_on_prompt": True}, "refused", "train_on_prompt"),
    ("mask_history", "sft", {"mask_history": True}, "refused", "mask_history"),
    ("packing", "sft", {"packing": True}, "refused", "packing"),
    ("val_size", "sft", {"val_size": 6}, "refused", "samples = 16"),
    (
        "sampling",
        "packing",
        {"train_sampling_strategy": "group_by_length"},
        "refused",
        "train_sampling_strategy = random",
    ),
    ("buffer_size", "streaming", {"buffer_size": 7}, "refused", "buffer_size: 4 -> 7"),
    ("data sets", "packing", {"dataset": "talks"}, "another run", "its dataset is"),
    ("lora_rank", "lora dropout", {"lora_rank": 8}, "another run", "its lora_rank is 4"),
    ("lora_alpha", "lora dropout", {"lora_alpha": 2}, "refused", "lora_alpha"),
    ("optim", "sft", {"optim": "adafactor"}, "refused", "optim: adamw_torch -> adafactor"),
    ("stage", "sft", {"stage": "pt"}, "another run", "its stage is sft"),
    ("plateau", "sft", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "refused", "reduce_lr_on"),
    ("finetuning_type", "sft", {"finetuning_type": "lora"}, "another run", "finetuning_type"),
    ("ignored data", "sft", {"cutoff_len": 40, "ignore_data_skip": True}, "applied", "cutoff_len"),
    ("learning_rate", "sft", {"learning_rate": 5e-4}, "rate", 0.5),
    ("learning_rate", "lora dropout", {"learning_rate": 5e-4}, "rate", 0.5),
    ("learning_rate", "ddp2 lora dropout", {"learning_rate": 5e-4}, "rate", 0.5),
    ("schedule", "sft", {"lr_scheduler_type": "constant"}, "applied", "lr_scheduler_type: cosine"),
    ("warmup_steps", "sft", {"warmup_steps": 4}, "applied", "warmup_steps: 0.0 -> 4"),
    ("weight_decay", "sft", {"weight_decay": 0.1}, "applied", "weight_decay: 0.0 -> 0.1"),
    ("adam_beta2", "sft", {"adam_beta2": 0.9}, "applied", "adam_beta2: 0.999 -> 0.9"),
    ("max_steps", "sft", {"max_steps": 4}, "applied", "max_steps: 6 -> 4"),
    ("save_steps", "sft", {"save_steps": 3}, "saves", [2, 3, 6]),
    ("save_total_limit", "sft", {"save_total_limit": 1}, "saves", [6]),
    ("logging_steps", "sft", {"logging_steps": 1}, "logs", [3, 4, 5, 6]),
    ("optim, the same states", "sft", {"optim": "adamw_torch_fused"}, "near", 1e-5),
    ("one process to two of a sequence", "sft", {**ONE_MORE, "processes": 2}, "near", TOLERANCE),
    (
        "one process to two of data",
        "packing",
        {"gradient_accumulation_steps": 1, "processes": 2},
        "near",
        TOLERANCE,
    ),
    (
        "two of a sequence to one",
        "sp2",
        {"sequence_parallel_size": 1, "processes": 1},
        "near",
        TOLERANCE,
    ),
    (
        "two of a sequence to two of data",
        "sp2",
        {"sequence_parallel_size": 1, "gradient_accumulation_steps": 1, "processes": 2},
        "near",
        TOLERANCE,
    ),
    ("cached references, other processes", "dpo", {**ONE_MORE, "processes": 2}, "near", 1e-5),
]


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """The changes in their order, whatever the seed."""
    for number, (name, run, _, how, _) in enumerate(CHANGES[:count]):
        yield {"number": number, "changed": name, "run": run, "ends": how, "seed": seed}


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    """Goes on from the checkpoint of step `AT` of the uninterrupted run, with the change."""
    name, run, keys, how, wanted = CHANGES[case["number"]]
    reference, expected, _, _ = runs.reference(run)
    begun, out, keys = time.monotonic(), home / "out", dict(keys)
    for folder in ("out", "cache"):
        if (reference / folder).is_dir():  # a stream has no cache
            shutil.copytree(reference / folder, home / folder)
    at = _step(run, reference)
    runs.unfinish(out, keep=at)
    processes = keys.pop("processes", runs.RUNS[run][0])
    if (edit := keys.pop("edit", None)) is not None:
        keys["dataset_dir"] = _edited(home / "inputs", edit)
    started = runs.Run(runs.words(run, nproc_per_node=processes, **keys), home, processes)
    status = started.wait(100)
    started.gone(0.0 if status is None else 5.0)
    log = (home / "log").read_text(errors="replace")
    wrong = _judge(run, how, wanted, status, log, out, reference, expected, at)
    return {
        "ok": not wrong,
        "group": how,
        "seconds": time.monotonic() - begun,
        "limit": 120.0,
        "end": "; ".join(wrong[:4]) or f"{name}: {how}",
    }


def _step(run: str, reference: Path) -> int:
    """The checkpoint to go on from: `AT`, or the first that `save_total_limit` has left."""
    there = sorted(int(p.name.split("-")[1]) for p in (reference / "out").glob("checkpoint-*"))
    return AT if AT in there else there[0]


def _judge(
    run: str,
    how: str,
    wanted: Any,
    status: int | None,
    log: str,
    out: Path,
    reference: Path,
    expected: dict[str, str],
    at: int,
) -> list[str]:
    if how in ("refused", "another run"):
        found = [] if status == 2 else [f"rc {status}, expected 2"]
        found += (
            [] if wanted in log else [f"{wanted!r} is not told: {' '.join(log.split())[-300:]}"]
        )
        return found + (["a traceback"] if "Traceback" in log else [])
    if status != 0:
        return [f"rc {status}: {' '.join(log.split())[-400:]}"]
    if how == "equal":
        found = runs.state_of(out)
        kept = {n: h for n, h in expected.items() if _after(n, at)}
        found = {n: h for n, h in found.items() if _after(n, at)}
        moved = [n for n in kept if n.endswith(("README.md", "longfactory.yaml"))]
        return [w for w in runs.differences(kept, found) if w.split()[0] not in moved]
    rows, before = _rows(out), _rows(reference / "out")
    if how == "applied":
        return [] if wanted in log and "and applied" in log else [f"{wanted!r} is not told"]
    if how == "rate":
        pairs = zip(rows, before, strict=True)
        bad = [
            r
            for r, b in pairs
            if r["step"] > at and _off(r["learning_rate"], wanted * b["learning_rate"]) > 1e-9
        ]
        return [f"another learning rate was trained with: {bad}"] if bad else []
    if how == "saves":
        found = sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
        return [] if found == wanted else [f"checkpoints {found}, expected {wanted}"]
    if how == "logs":
        found = [r["step"] for r in rows]
        return [] if found == wanted else [f"rows of steps {found}, expected {wanted}"]
    names = ("loss", "grad_norm")
    off = worst(_off(r[n], b[n]) for r, b in zip(rows, before, strict=True) for n in names)
    return [] if off <= wanted else [f"losses or norms differ by {off:.1e}, allowed {wanted}"]


def _after(name: str, at: int) -> bool:
    """Whether a file is of the end of the run, or of a checkpoint that was made again."""
    first = name.split("/")[0]
    return not first.startswith("checkpoint-") or int(first.split("-")[1]) >= at


def _rows(out: Path) -> list[dict[str, Any]]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [h for h in history if "loss" in h]


def _off(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


def _edited(home: Path, edit: str) -> Path:
    """A copy of the inputs: with another letter in a row of a data set, or with a row more (+)."""
    shutil.copytree(runs.inputs(), home)
    if edit:
        path = home / f"{edit.removeprefix('+')}.json"
        rows = json.loads(path.read_text())
        if edit.startswith("+"):
            rows.append(rows[0])
        else:
            last = rows[-1]["output"]
            rows[-1]["output"] = ("a" if last[0] != "a" else "b") + last[1:]
        path.write_text(json.dumps(rows))
    return home
