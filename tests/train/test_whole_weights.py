"""Experts, which files and models name differently, come back from a checkpoint: a resumed run, the
best model, one without them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longfactory.errors import UserError
from longfactory.testing import assert_matches_single_process, tiny_model
from longfactory.train.whole_weights import load_renamed
from small_runs import home, steps, train

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture


@pytest.fixture(scope="module")
def experts(home: Path) -> Path:
    """A mixture of experts beside the tokenizer of `home`."""
    shutil.copytree(home / "model", home / "experts")
    vocabulary = load_file(home / "experts" / "model.safetensors")[
        "model.embed_tokens.weight"
    ].shape[0]
    tiny_model("qwen3_moe", seed=3, vocab_size=vocabulary).save_pretrained(home / "experts")
    return home / "experts"


RUN: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
}


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_goes_on_with_the_experts_that_it_trained(
    home: Path, experts: Path, size: int
) -> None:
    full = train(home, f"full{size}", 1, model_name_or_path=experts, **RUN)
    shutil.copytree(home / f"full{size}" / "checkpoint-2", home / f"rest{size}" / "checkpoint-2")
    rest = train(
        home, f"rest{size}", size, model_name_or_path=experts, overwrite_output_dir=False, **RUN
    )
    for a, b in zip(steps(full), steps(rest), strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=1e-5)
    saved = [load_file(home / f"{name}{size}" / "model.safetensors") for name in ("full", "rest")]
    assert_matches_single_process(saved[1], saved[0], 1e-5)


def test_the_best_model_has_its_own_experts(home: Path, experts: Path) -> None:
    """With a learning rate that spoils everything the first evaluation is the best."""
    changes = RUN | {
        "learning_rate": 50.0,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "val_size": 3,
    }
    train(home, "best", 1, model_name_or_path=experts, **changes)
    saved, first = (
        load_file(p / "model.safetensors") for p in (home / "best", home / "best" / "checkpoint-2")
    )
    assert_matches_single_process(saved, first, 0.0)


def test_only_what_has_another_name_is_read_again(tmp_path: Path) -> None:
    trained, fresh = (tiny_model("qwen3_moe", seed=s, tie_word_embeddings=True) for s in (1, 2))
    trained.save_pretrained(tmp_path)
    read = load_renamed(fresh, tmp_path)
    assert read and all(".experts." in name for name in read)
    for name, t in fresh.state_dict().items():
        assert torch.equal(t, trained.state_dict()[name]) == (name in read or "norm" in name), name
    assert load_renamed(tiny_model("llama"), tmp_path / "nothing") == []
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    assert load_renamed(tiny_model("llama", tie_word_embeddings=True), tmp_path / "dense") == []
    file = tmp_path / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(file).items() if ".experts." not in k},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"does not hold model\.layers\.0\.mlp\.experts"):
        load_renamed(fresh, tmp_path)
