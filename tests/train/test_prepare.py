"""What is said of a run before its process group is open."""

from __future__ import annotations

import re

import pytest
from transformers import AutoConfig

from longfactory.train.prepare import beyond_positions


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
