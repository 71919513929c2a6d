"""The same DPO run in LongFactory and in TRL's DPOTrainer: same model, same tokens in the same
order, float32. Compares the curves.

    python benchmarks/trl_comparison.py                     # one process each
    python benchmarks/trl_comparison.py --size 2 --mode ulysses

TRL trains each answer with its own copy of the prompt, padded; LongFactory one row of [prompt |
chosen | rejected], with --size above 1 split over that many processes. Writes
benchmarks/results/trl_comparison_*.json and docs/images/trl_comparison_*.png.
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
TOLERANCE = 1e-4
METRICS = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)


def keys(options: argparse.Namespace, folder: str) -> list[str]:
    """One configuration for both sides."""
    return [
        "model_name_or_path=smollm2-135m-instruct", "stage=dpo", "do_train=true", "finetuning_type=full", "pref_beta=0.1",
        f"pref_loss={options.loss}", "precompute_ref_log_probs=true", "dataset=manual_dpo", "dataset_dir=data", "template=chatml",
        f"cutoff_len={options.cutoff_len}", f"max_samples={options.steps * options.batch}", "disable_shuffling=true",
        f"per_device_train_batch_size={options.batch}", "gradient_accumulation_steps=1", f"max_steps={options.steps}",
        "learning_rate=5.0e-6", "lr_scheduler_type=constant", "optim=adamw_torch", "max_grad_norm=1.0", "seed=42", "logging_steps=1",
        "save_strategy=no", "report_to=none", "use_cpu=true", "disable_gradient_checkpointing=true", "overwrite_output_dir=true",
        "preprocessing_num_workers=1", "dataloader_num_workers=0", f"output_dir={folder}",
    ]  # fmt: skip


def ours(options: argparse.Namespace, folder: str) -> list[dict[str, float]]:
    split = [
        f"sequence_parallel_size={options.size}",
        f"sequence_parallel_mode={options.mode}",
        f"nproc_per_node={options.size}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "train", *keys(options, folder), *split],
        check=True,
        cwd=ROOT,
        env=environment,
    )
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def trl(options: argparse.Namespace, folder: str) -> list[dict[str, float]]:
    import torch
    from datasets import Dataset
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from longfactory.config import load_config
    from longfactory.model import load
    from longfactory.train.prepare import load_data

    class SameTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset  # tokenised already

        def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    cfg = load_config([*keys(options, folder), "pref_share_prompt=false"])
    tokenizer = load.load_tokenizer(cfg.model)
    pairs = load_data(cfg, tokenizer).train
    rows = []
    for i in range(len(pairs)):
        documents = {d.role: d for d in pairs[i]}
        prompt = sum(label == -100 for label in documents["chosen"].labels)
        rows.append({"prompt_ids": list(map(int, documents["chosen"].input_ids[:prompt]))})
        for role, d in documents.items():
            assert all(label == -100 for label in d.labels[:prompt]) and list(
                d.labels[prompt:]
            ) == list(d.input_ids[prompt:])
            rows[-1][f"{role}_ids"] = list(map(int, d.input_ids[prompt:]))
    torch.set_num_threads(options.threads)
    set_seed(42)
    model = load.load_model(
        cfg.model, load.load_config(cfg.model, options.cutoff_len), torch.float32, attention="sdpa"
    )
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,
        max_steps=options.steps,
        learning_rate=5e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.1,
        loss_type=[options.loss],
        max_length=None,
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
    )
    trainer = SameTokens(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    return trainer.state.log_history


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cutoff-len", type=int, default=512)
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--mode", default="zigzag-ring")
    parser.add_argument("--loss", default="sigmoid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        logs = {"longfactory": ours(options, a), "trl": trl(options, b)}
    curves = {
        side: {m: [h[m] for h in log if "loss" in h and m in h] for m in METRICS}
        for side, log in logs.items()
    }
    from longfactory.sp.distance import worst

    largest = {}
    for metric in METRICS:
        x, y = curves["longfactory"][metric], curves["trl"][metric]
        if len(x) != options.steps or len(y) != options.steps:
            raise SystemExit(f"{metric}: {len(x)} and {len(y)} values for {options.steps} steps")
        scale = max(map(abs, y))
        largest[metric] = worst(
            abs(p - q) / (abs(q) if metric in ("loss", "grad_norm") else scale)
            for p, q in zip(x, y, strict=True)
        )
    import torch
    import transformers
    from trl import __version__ as trl_version

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl_version,
    }
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "threads")}
    name = f"trl_comparison_{options.loss}_sp{options.size}"
    result = {
        "settings": settings,
        "versions": versions,
        "largest_relative_difference": largest,
        "curves": curves,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    from longfactory.train.plots import overlay

    label = "LongFactory" if options.size == 1 else f"LongFactory, {options.size} processes"
    points = {label: curves["longfactory"]["loss"], f"TRL {trl_version}": curves["trl"]["loss"]}
    picture = ROOT / "docs" / "images" / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    overlay(
        {n: list(enumerate(v, 1)) for n, v in points.items()},
        picture,
        title="DPO, SmolLM2-135M-Instruct, the same pairs in the same order",
    )
    print(f"\n{'step':>4} {'LongFactory':>12} {'TRL':>12}")
    for i, (x, y) in enumerate(
        zip(*(curves[s]["loss"] for s in ("longfactory", "trl")), strict=True), 1
    ):
        print(f"{i:>4} {x:>12.8f} {y:>12.8f}")
    print("largest relative difference: " + ", ".join(f"{m} {v:.1e}" for m, v in largest.items()))
    ok = largest["loss"] <= TOLERANCE
    print("the curves agree" if ok else f"the loss curves differ by more than {TOLERANCE:g}")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
