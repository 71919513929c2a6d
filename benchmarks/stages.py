"""Every stage on a pretrained model and real text, with one process and split over two: do losses
fall, and are the curves one line?

    python benchmarks/stages.py                 # all stages, about half an hour on two CPU cores
    python benchmarks/stages.py dpo kto

SmolLM2-135M-Instruct, all parameters, float32, Python's manual. Few samples, seen several times:
what is shown is that each objective is learnt. Writes benchmarks/results/stages.json and a picture
for each stage into docs/images/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMON = {
    "model_name_or_path": "smollm2-135m-instruct",
    "do_train": "true",
    "finetuning_type": "full",
    "dataset_dir": "data",
    "template": "chatml",
    "max_steps": 24,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "save_final_model": "false",
    "report_to": "none",
    "use_cpu": "true",
    "disable_gradient_checkpointing": "true",
    "overwrite_output_dir": "true",
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "seed": 42,
}
STAGES: dict[str, dict[str, Any]] = {
    "pt": {
        "stage": "pt",
        "dataset": "manual_pt",
        "cutoff_len": 192,
        "max_samples": 3,
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 1,
    },
    "sft": {
        "stage": "sft",
        "dataset": "manual_sft",
        "cutoff_len": 160,
        "max_samples": 8,
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 2,
        "compute_accuracy": "true",
    },
    "dpo": {
        "stage": "dpo",
        "dataset": "manual_dpo",
        "cutoff_len": 128,
        "max_samples": 12,
        "learning_rate": 5e-6,
        "per_device_train_batch_size": 2,
        "precompute_ref_log_probs": "true",
    },
    "kto": {
        "stage": "kto",
        "dataset": "manual_kto",
        "cutoff_len": 96,
        "max_samples": 12,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 3,
        "pref_beta": 0.3,
        "precompute_ref_log_probs": "true",
    },
    "rm": {
        "stage": "rm",
        "dataset": "manual_dpo",
        "cutoff_len": 320,
        "max_samples": 40,
        "val_size": 12,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 24,
        "eval_on_start": "true",
    },
}


def train(name: str, size: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        keys = (
            COMMON
            | STAGES[name]
            | {
                "sequence_parallel_size": size,
                "nproc_per_node": size,
                "output_dir": folder,
            }
        )
        command = [
            sys.executable,
            "-m",
            "longfactory.cli",
            "train",
            *(f"{k}={v}" for k, v in keys.items()),
        ]
        # One thread a process, so that the two runs differ in nothing but the split.
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


Curves = dict[str, list[tuple[int, float]]]


def curves_of(history: list[dict[str, Any]]) -> Curves:
    """metric -> (step, value). A metric is missing where nothing was counted: a step of KTO with
    answers of one label has no margin.
    """
    unwanted = (
        "epoch",
        "step",
        "learning_rate",
        "total_flos",
        "train_",
        "eval_runtime",
        "eval_samples",
        "eval_steps",
    )
    names = sorted({k for h in history for k in h if not k.startswith(unwanted)})
    return {k: [(h["step"], h[k]) for h in history if k in h] for k in names}


def picture(name: str, runs: dict[str, Curves], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    right = next((k for k in ("rewards/margins", "accuracy") if k in runs["sp1"]), None)
    figure, axes = plt.subplots(
        1, 2 if right else 1, figsize=(9 if right else 5, 3.2), squeeze=False
    )
    for ax, key in zip(axes[0], ["loss", right] if right else ["loss"], strict=True):
        for size, style in (
            (1, {"color": "#f5b041", "linewidth": 6, "alpha": 0.7}),
            (2, {"color": "#1a5276", "linewidth": 1.4}),
        ):
            ax.plot(
                *zip(*runs[f"sp{size}"][key], strict=True),
                label=f"sequence_parallel_size: {size}",
                **style,
            )
        ax.set_xlabel("step")
        ax.set_ylabel(key)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"stage: {name}, SmolLM2-135M-Instruct on Python's manual", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(runs: dict[str, Curves]) -> dict[str, Any]:
    """First and last loss (means of four steps), accuracies, and how far the two curves are apart."""
    values = {
        size: {k: [v for _, v in points] for k, points in curves.items()}
        for size, curves in runs.items()
    }
    from longfactory.sp.distance import worst

    one, two = values["sp1"], values["sp2"]
    out: dict[str, Any] = {
        "first": sum(one["loss"][:4]) / 4,
        "last": sum(one["loss"][-4:]) / 4,
        "largest_difference": worst(
            abs(a - b) for a, b in zip(one["loss"], two["loss"], strict=True)
        ),
    }
    for key in {"accuracy", "rewards/accuracies", "eval_accuracy"} & two.keys():
        last = two[key][-1:] if key == "eval_accuracy" else two[key][-4:]
        out[key] = {"first": two[key][0], "last": sum(last) / len(last)}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="stage")
    names = parser.parse_args().stages
    results = ROOT / "benchmarks" / "results" / "stages.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    for name in names:
        runs = {f"sp{size}": curves_of(train(name, size)) for size in (1, 2)}
        picture(name, runs, ROOT / "docs" / "images" / f"stage_{name}.png")
        known[name] = {"settings": COMMON | STAGES[name], "summary": summary(runs), "curves": runs}
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {json.dumps(known[name]['summary'])}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
