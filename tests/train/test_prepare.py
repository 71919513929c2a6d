"""What is said of a run before its process group is open."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from families_here import is_made_here
from longfactory.data.module import Datasets
from longfactory.errors import UserError
from longfactory.train.prepare import beyond_positions, check_evaluation
from longfactory_dev.layers import exact_families
from longfactory_dev.tiny_models import tiny_config


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_positions_that_the_checkpoint_has_stretched(scaling: dict[str, object]) -> None:
    config = AutoConfig.for_model(
        "qwen2",
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 1e6, **scaling},
    )
    assert beyond_positions(config, 512) is None
    assert "was made for 512 (max_position_embeddings and rope_parameters" in str(
        beyond_positions(config, 513)
    )


def test_positions_that_may_count_a_linear_stretch() -> None:
    """Gemma 3's 131,072 are eight times those of its pretraining."""
    stretched = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    windows = {"rope_type": "default", "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "gemma3_text",
        max_position_embeddings=1024,
        rope_parameters={"full_attention": stretched, "sliding_attention": windows},
    )
    assert beyond_positions(config, 1024) is None
    assert (
        "was made for 1,024 (max_position_embeddings in its config.json; 8,192 if that does not"
        " count rope_parameters)" in str(beyond_positions(config, 1025))
    )


@pytest.mark.parametrize(
    ("kind", "longest", "said"),
    [
        ("qwen2", 128, None),
        ("qwen2", 129, "has 129 tokens, and the model was made for 128 .* Set rope_scaling: yarn"),
        ("gpt2", 129, "a table of positions, as GPT-2 and OPT, .* Set cutoff_len: 128"),
        ("mamba", 1 << 20, None),
    ],
)
def test_rows_that_are_longer_than_the_model_was_made_for(
    kind: str, longest: int, said: str | None
) -> None:
    positions = {} if kind == "mamba" else {"max_position_embeddings": 128}
    words = beyond_positions(AutoConfig.for_model(kind, **positions), longest)
    assert (words is None) == (said is None)
    assert said is None or re.search(said, str(words))


def test_positions_of_every_family_are_read() -> None:
    """Beam's full attention has no rotary parameters, where its windows have some."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for family in exact_families(page):
        if not is_made_here(family):
            continue
        config = tiny_config(family)
        counted = getattr(config.get_text_config(), "max_position_embeddings", None)
        assert (beyond_positions(config, 1 << 40) is None) == (not counted), family


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({}, None),
        ({"do_eval": True}, "do_eval"),
        ({"do_predict": True}, "do_predict"),
        ({"do_eval": True, "eval_strategy": "steps"}, "eval_strategy: steps"),
    ],
)
def test_saved_data_without_an_evaluation_are_told_before_the_run(
    keys: dict[str, Any], asked: str | None
) -> None:
    trainer = SimpleNamespace(
        **{"do_eval": False, "do_predict": False, "eval_strategy": "no"} | keys
    )
    cfg: Any = SimpleNamespace(trainer=trainer, data=SimpleNamespace(tokenized_path="tokens"))
    held_out: Any = {"eval": SimpleNamespace()}
    check_evaluation(cfg, Datasets(None, held_out, None))
    if asked is None:
        check_evaluation(cfg, Datasets(None, {}, None))
        return
    with pytest.raises(UserError, match=rf"tokens\) were saved without .* run has {asked}\. Save"):
        check_evaluation(cfg, Datasets(None, {}, None))
