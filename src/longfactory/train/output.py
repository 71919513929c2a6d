"""The files of a finished run: weights, tokenizer, result files, curves, model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from longfactory.model import value_head
from longfactory.train.plots import plot_history

BY_US, BY_PEFT = "trained by LongFactory:", "# Model Card for Model ID"
"""By these words a card is known that may be written anew: ours, and the empty form that peft leaves beside an adapter."""
CURVES = ("loss", "eval_loss", "eval_accuracy", "rewards/accuracies")


def curves(cfg: Any) -> list[str]:
    """What is drawn of a run, where it was logged: LLaMA-Factory's pictures."""
    each = (
        [f"eval_{name}_{what}" for name in cfg.data.eval_dataset for what in ("loss", "accuracy")] if cfg.data.eval_on_each_dataset else []
    )
    return [*CURVES, *(["rewards/chosen"] if cfg.method.stage == "kto" else []), *each]


def save_trained(trainer: Any, cfg: Any, tokenizer: Any, result: Any) -> None:
    """Weights as plain safetensors, tokenizer, `train_results.json`, `trainer_state.json`, curves. Collective.

    Of a run that had been over before, the weights alone: its results are not those of no steps.
    """
    if cfg.output.save_final_model:
        trainer.save_model()
    if trainer.finished:
        return
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if cfg.method.plot_loss and trainer.is_world_process_zero():
        plot_history(trainer.state.log_history, trainer.args.output_dir, curves(cfg))


def evaluate(trainer: Any, cfg: Any, datasets: Any) -> dict[str, float]:
    """Evaluates and writes `eval_results.json`. Collective."""
    metrics = trainer.evaluate(metric_key_prefix="eval")
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def save_value_head(trainer: Any, folder: str) -> None:
    """`value_head.safetensors`, beside the weights of a reward model."""
    from safetensors.torch import save_file

    full = [_whole(p) for p in (trainer.head.value.weight, trainer.head.value.bias)]
    if trainer.is_world_process_zero():
        tensors = {value_head.WEIGHT: full[0].cpu().contiguous(), value_head.BIAS: full[1].cpu().contiguous()}
        path = os.path.join(folder, value_head.FILE)
        save_file(tensors, path + ".part", metadata={"format": "pt"})
        os.replace(path + ".part", path)


def _whole(p: torch.Tensor) -> torch.Tensor:
    if hasattr(p, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def write_model_card(cfg: Any, folder: str) -> None:
    """README.md of the output folder: what was trained, on what, with which keys. A card that a person has written stays."""
    path = Path(folder) / "README.md"
    if path.exists() and not any(mark in path.read_text(encoding="utf-8", errors="replace") for mark in (BY_US, BY_PEFT)):
        return
    tags = ["longfactory", cfg.method.finetuning_type, cfg.method.stage]
    text = "\n".join(
        [
            "---",
            f"library_name: {'peft' if cfg.method.finetuning_type == 'lora' else 'transformers'}",
            "license: other",
            f"base_model: {cfg.model.model_name_or_path}",
            "tags:",
            *[f"- {t}" for t in tags],
            "---",
            "",
            f"# {Path(folder).name}",
            "",
            f"{cfg.model.model_name_or_path}, {BY_US} stage {cfg.method.stage}, {cfg.method.finetuning_type}, "
            f"data {', '.join(cfg.data.dataset)}.",
            "",
            "## Configuration",
            "",
            "```yaml",
            cfg.resolved().strip(),
            "```",
            "",
            f"torch {torch.__version__}",
            "",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `trainer_log.jsonl`."""
    from longfactory.train.callbacks import LOG_FILE

    with open(Path(folder) / LOG_FILE, encoding="utf-8") as f:
        return [json.loads(line) for line in f]
