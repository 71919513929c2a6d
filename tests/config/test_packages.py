"""A package that is not there is named with how to install it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from longfactory.config import from_mapping
from smallest_run import BASE, problem


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            'pip install "longfactory[deepspeed]"',
        ),
        ({"quantization_bit": 4}, 'pip install "longfactory[quantization]"'),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, 'install "longfactory[hqq]"'),
        ({"enable_liger_kernel": True}, 'pip install "longfactory[liger]"'),
        ({"attention_backend": "fa4"}, 'pip install "longfactory[fa4]"'),
        (
            {"attention_backend": "fa2"},
            "flash2 is not installed. Run: pip install flash-attn, or use attention_backend: auto",
        ),
        ({"attention_backend": "fa3"}, "Build FlashAttention 3"),
        ({"use_swanlab": True}, "pip install swanlab"),
        (
            {"report_to": "tensorboard"},
            "report_to: tensorboard is not installed. Run: pip install tensorboard",
        ),
        ({"report_to": ["wandb"]}, "pip install wandb"),
        ({"optim": "apollo_adamw", "optim_target_modules": "q_proj"}, "pip install apollo-torch"),
        ({"optim": "schedule_free_sgd"}, "pip install schedulefree"),
        ({"optim": "paged_adamw_32bit"}, "pip install bitsandbytes"),
    ],
)
def test_missing_packages(
    keys: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert words in problem(**keys)
    # A file can be looked at where the packages are not.
    assert any(words in note for note in from_mapping({**BASE, **keys, "dry_run": True}).notes)
