"""Evaluations, generated answers and the best checkpoint: every contradiction has its sentence."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import from_mapping
from smallest_run import BASE, problem

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"save_strategy": "best"}, "Set metric_for_best_model"),
    (
        {
            "eval_dataset": "a,b",
            "eval_on_each_dataset": True,
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
        },
        "Set metric_for_best_model: eval_a_loss",
    ),
    (
        {
            "eval_dataset": "a,b",
            "eval_on_each_dataset": True,
            "early_stopping_steps": 2,
            "eval_strategy": "steps",
        },
        "Set metric_for_best_model: eval_a_loss",
    ),
    (
        {
            "eval_dataset": "a,b",
            "eval_on_each_dataset": True,
            "metric_for_best_model": "loss",
            "eval_strategy": "steps",
        },
        "Set metric_for_best_model: eval_a_loss",
    ),
    (
        {
            "eval_dataset": "a",
            "eval_on_each_dataset": True,
            "metric_for_best_model": "a_loss",
            "eval_strategy": "steps",
        },
        "no evaluation computes a_loss",
    ),
    *(
        ({"val_size": 2, "eval_strategy": "steps", "metric_for_best_model": name}, message)
        for name, message in (
            ("eval_rouge-l", "metric_for_best_model: eval_rouge-l measures generated answers"),
            ("accuracy", "metric_for_best_model: accuracy needs compute_accuracy: true"),
            ("eval_los", "metric_for_best_model: no evaluation computes eval_los"),
        )
    ),
    ({"stage": "rm", "load_best_model_at_end": True}, "not supported with stage: rm"),
    ({"early_stopping_steps": 2}, "Set eval_strategy"),
    ({"predict_with_generate": True, "stage": "dpo"}, "is for stage: sft"),
    ({"do_predict": True, "eval_dataset": "e"}, "Set predict_with_generate: true"),
    ({"predict_with_generate": True, "compute_accuracy": True}, "Keep one of them"),
    ({"predict_with_generate": True, "sequence_parallel_size": 2}, "Set sequence_parallel_size: 1"),
]


@pytest.mark.parametrize(("keys", "words"), REFUSALS, ids=[" ".join(k) for k, _ in REFUSALS])
def test_refused(keys: dict[str, Any], words: str) -> None:
    assert words in problem(**keys)


@pytest.mark.parametrize(
    ("metric", "keys"),
    [
        ("eval_loss", {}),
        ("accuracy", {"compute_accuracy": True}),
        ("expert_entropy", {}),
        ("eval_rewards/accuracies", {"stage": "dpo"}),
        ("eval_math_hard_loss", {"eval_dataset": "math,math_hard", "eval_on_each_dataset": True}),
        ("eval_new_loss", {"eval_dataset": "a/old.json,a/new.json", "eval_on_each_dataset": True}),
    ],
)
def test_metrics_that_evaluations_compute(metric: str, keys: dict[str, Any]) -> None:
    if "eval_dataset" not in keys:
        keys = {**keys, "val_size": 2}
    from_mapping({**BASE, "eval_strategy": "steps", "metric_for_best_model": metric, **keys})
