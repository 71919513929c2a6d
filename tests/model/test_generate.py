"""Generation settings of published checkpoints, which transformers refuses to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from longfactory.model.generate import make_generation_config_valid
from longfactory.testing import tiny_model


@pytest.mark.parametrize(
    ("given", "kept", "changes"),
    [
        ({}, {}, []),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}, []),
        (
            {"do_sample": False, "temperature": 0.6},
            {"temperature": 0.6, "do_sample": True},
            ["do_sample: False beside temperature: 0.6"],
        ),
        ({"min_p": 0.1}, {"min_p": 0.1, "do_sample": True}, ["do_sample: None beside min_p: 0.1"]),
        ({"length_penalty": 2.0}, {"length_penalty": None}, ["length_penalty: 2.0 became None"]),
        (
            {"pad_token_id": -1, "eos_token_id": 2},
            {"pad_token_id": None, "eos_token_id": 2},
            ["pad_token_id: -1 became None"],
        ),
        ({"early_stopping": "sometimes"}, {}, ["early_stopping: sometimes became None"]),
        ({"assistant_model": "x"}, {}, ["assistant_model: x became absent"]),
        ({"num_return_sequences": 3}, {}, ["num_return_sequences: 3 became None"]),
        (
            {
                "temperature": 0.5,
                "do_sample": False,
                "output_scores": True,
                "cache_implementation": "odd",
            },
            {"do_sample": True},
            ["do_sample", "cache_implementation", "output_scores"],
        ),
        (
            {"suppress_tokens": 5, "eos_token_id": 2},
            {"eos_token_id": 2},
            ["all settings but the token ids"],
        ),
    ],
)
def test_what_would_not_be_saved_is_changed(
    given: dict[str, Any], kept: dict[str, Any], changes: list[str], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig()
    for key, value in given.items():
        setattr(model.generation_config, key, value)
    told = make_generation_config_valid(model)
    assert len(told) == len(changes) and all(
        any(what in line for line in told) for what in changes
    ), told
    assert {key: getattr(model.generation_config, key) for key in kept} == kept
    model.generation_config.save_pretrained(tmp_path)
    assert make_generation_config_valid(model) == []
