"""The part `parity` of `many_gpus.py`: bf16 beside float32, and gradients in float32."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path

from _many_commands import Job, in_one_group, side_by_side, workplace
from _many_models import BYTES, model_folder
from _many_table import Row, earlier, keep, wanted
from longfactory.sp.distance import worst
from make_model import make_model
from sp_training import make_data


def parity(a: argparse.Namespace) -> int:
    """Losses of 20 steps, SP over all GPUs and one GPU in bf16, from those of one GPU in float32;
    and the gradients of a tiny model in float32 under every mode, by `longfactory verify`.

    Each seed gives another order of the data and other weights. All runs go at once; a row is
    printed when its runs have ended. The median is of all seeds in the table.
    """
    length, steps, layers = 4096, 20, None
    seeds = [seed for seed in range(a.repeats) if wanted(a, f"seed {seed}")]
    if a.small:
        length, layers = 128 if a.smoke else 1024, 2
    rows, found = earlier(a), {}
    one_at_a_time = threading.Lock()
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-0.5b", layers)
        make_data(home / "data", steps, 2 * length)

        def run(kind: str, seed: int, devices: Sequence[int]) -> Job:
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": length,
                "sequence_parallel_size": len(devices),
                "gradient_accumulation_steps": 1,
                "max_steps": steps,
                "learning_rate": "1e-4",
                "seed": seed,
                "disable_shuffling": "false",
                "bf16": str(kind != "float32").lower(),
                **({"sharding": "ddp"} if len(devices) > 1 else {}),
            }
            return Job(f"{kind}-{seed}", keys)

        def tell(name: str, row: Row) -> None:
            with one_at_a_time:
                found[name] = row
                kind, _, which = name.partition("-")
                if kind != "gradients":
                    ends = [found.get(f"{k}-{which}") for k in ("float32", "one GPU", "all")]
                    if None not in ends:
                        about = f"seed {which}, {steps} steps of {length:,} tokens"
                        keep(a, {"row": about, **distances(a, ends)}, rows)
                    return
                report = home / f"verify-{which}.json"
                if report.exists():
                    row |= verified(json.loads(report.read_text()))
                keep(a, {"row": f"float32, {which}: gradients", **row}, rows)

        every = list(range(a.gpus))
        modes = [m for m in ("zigzag-ring", "ulysses", "llama3", "usp") if wanted(a, m)]
        # All groups share the GPUs: nothing is timed. Few of them: the first run of each compiles,
        # and more processes than cores that compile take longer than runs that follow each other.
        groups = [
            (every, [run("all", s, every) for s in seeds]),
            (every, [gradients(a, home, mode) for mode in modes]),
        ]
        alone = [(kind, seed) for seed in seeds for kind in ("float32", "one GPU")]
        for i in every:
            groups.append(([i], [run(*each, [i]) for each in alone[i :: a.gpus]]))
        calls = [
            functools.partial(in_one_group, home, devices, jobs, a.end - 5, tell, a.after)
            for devices, jobs in groups
            if jobs
        ]
        side_by_side(calls, most=2 if a.smoke else len(calls))
    rows[:] = [r for r in rows if not r["row"].startswith("median")]
    ratios = [r["ratio"] for r in rows if "ratio" in r]
    if ratios:
        keep(a, {"row": f"median of {len(ratios)}", "ratio": statistics.median(ratios)}, rows)
    return int(not ratios or any("error" in r for r in found.values()))


PARITY_NOTE = (
    "Qwen2.5-0.5B's shape (with --smoke a tiny one, and CPU processes in place of GPUs), random"
    " weights, all parameters: root mean square, over the steps, of the differences of a step's loss"
    " (the mean over its tokens) from that of the same run on one GPU in float32. Gradients: a tiny"
    " model in float32, every parameter's gradient beside one process in float64, by `longfactory"
    " verify`."
)


def distances(a: argparse.Namespace, ends: Sequence[Row | None]) -> Row:
    """Of one seed: how far the losses of one GPU and of all in bf16 are from those in float32."""
    runs = [row or {} for row in ends]
    bad = [row["error"] for row in runs if "error" in row]
    if bad:
        return {"error": bad[0]}
    exact, one, every = (row["losses"] for row in runs)
    near, far = rms(one, exact), rms(every, exact)
    return {
        "one GPU from float32 (RMS)": near,
        f"SP {a.gpus} from float32 (RMS)": far,
        "ratio": far / near if near else float("inf"),
        "last loss": exact[-1],
    }


def gradients(a: argparse.Namespace, home: Path, mode: str) -> Job:
    """Every gradient of a tiny model in float32 under a mode, beside one process in float64."""
    model = make_model("tiny", home / f"tiny-{mode}", vocabulary=BYTES)
    report = home / f"verify-{mode}.json"
    keys = {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "dataset_dir": home / "data",
        "stage": "pt",
        "dataset": "long",
        "finetuning_type": "full",
        "packing": "false",
        "cutoff_len": 2048 if not a.smoke else 256,
        "sequence_parallel_size": a.gpus,
        "sequence_parallel_mode": mode,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "bf16": "false",
        "preprocessing_num_workers": 1,
        "report_to": "none",
    }
    return Job(f"gradients-{mode}", keys, "verify", ("--json", str(report)))


def rms(found: Sequence[float], exact: Sequence[float]) -> float:
    """Root mean square of the differences of two curves."""
    squares = [(x - y) ** 2 for x, y in zip(found, exact, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


def verified(report: Row) -> Row:
    """What `longfactory verify` found."""
    gradient = worst(p["difference"] for p in report["parameters"].values())
    row: Row = {"worst gradient": gradient, "loss off": report["loss"]["difference"]}
    row["grad_norm off"] = report["grad_norm"]["difference"]
    return row if report["exact"] else {**row, "error": "verify found a difference"}
