"""Whole runs on a stream that ends before `max_steps`: micro-batches, processes, order, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import load_config
from longfactory.train.prepare import load_data
from small_runs import home, keys, steps, train

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture

# Twelve samples, five to a step: the third step ends in the stream's second pass, the fifth in its
# third.
STREAM: dict[str, Any] = {
    "streaming": True,
    "packing": False,
    "max_steps": 6,
    "per_device_train_batch_size": 5,
    "optim": "sgd",
}
STREAM |= {"learning_rate": 0.05, "gradient_accumulation_steps": 1}


def numbers(log: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(h["loss"], h["grad_norm"]) for h in steps(log)]


def test_a_step_across_the_streams_end_is_a_step_like_others(home: Path) -> None:
    whole = numbers(train(home, "whole", 1, **STREAM))
    small = STREAM | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    assert len(whole) == 6
    for name, size in (("small", 1), ("split", 2)):
        for got, want in zip(numbers(train(home, name, size, **small)), whole, strict=True):
            assert got == pytest.approx(want, rel=1e-4), name


def test_a_stream_resumes_at_the_exact_sample_of_its_second_pass(home: Path) -> None:
    full = train(home, "full", 1, **STREAM, save_strategy="steps", save_steps=3)
    shutil.copytree(home / "full" / "checkpoint-3", home / "rest" / "checkpoint-3")
    rest = train(home, "rest", 2, **STREAM, save_strategy="no", overwrite_output_dir=False)
    assert json.loads((home / "rest" / "trainer_state.json").read_text())["global_step"] == 6
    for got, want in zip(numbers(rest), numbers(full), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_disable_shuffling_keeps_the_order_of_a_stream(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longfactory.model import load

    monkeypatch.setenv("LONGFACTORY_CACHE", str(home / "cache"))

    def tokens(**changes: Any) -> list[list[int]]:
        cfg = load_config([f"{k}={v}" for k, v in keys(home, "order", **STREAM | changes).items()])
        data: Any = load_data(cfg, load.load_tokenizer(cfg.model)).train
        return [
            sample[0].input_ids.tolist()
            for sample in (data if changes.get("streaming", True) else (data[i] for i in range(12)))
        ]

    kept, shuffled = tokens(disable_shuffling=True), tokens()
    assert kept == tokens(streaming=False) != shuffled
    assert sorted(kept) == sorted(shuffled)
