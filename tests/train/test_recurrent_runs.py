"""Runs of models with recurrent layers: two processes that share rows, and one."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.testing import run_ranks
from tiny_folders import with_tiny
from verify_ranks import verified

FAMILIES = ("qwen3_5_text", "kimi_linear", "nemotron_h", "lfm2")
CASES: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "lora, packed": {"finetuning_type": "lora", "packing": True},
    "dpo, shared prompt": {"stage": "dpo", "dataset": "manual_dpo", "pref_share_prompt": True},
}
FAST = {("qwen3_5_text", "lora, packed"), ("nemotron_h", "dpo, shared prompt")}
EVERY = [
    pytest.param(family, case, marks=() if (family, case) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for case in CASES
]


@pytest.mark.processes
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("family", "case"), EVERY)
def test_recurrent_runs_are_verified(family: str, case: str, sft_keys: dict[str, Any]) -> None:
    """Loss, grad_norm, log-probabilities and every gradient, adapters' in recurrent layers too."""
    keys = {**with_tiny(sft_keys, family), **CASES[case]}
    for exact, table, parameters in run_ranks(2, verified, keys, timeout=350):
        assert exact, table
        if "lora" in case:
            mixers = ("linear_attn", "mixer", "conv", "self_attn")
            assert any("lora" in name and any(m in name for m in mixers) for name in parameters)
