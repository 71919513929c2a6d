"""Configurations of well-known sizes, for tests that count their bytes and never load their weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from longfactory.plan.sizes import SIZES

QWEN_7B: dict[str, Any] = {
    k: v for k, v in SIZES["7b"][1].items() if k not in ("model_type", "architectures")
}


def of_size(name: str, **changes: Any) -> PretrainedConfig:
    """A new configuration at each call, by the plan's name of a size."""
    return AutoConfig.for_model(**(SIZES[name][1] | changes))


def qwen_7b(**changes: Any) -> PretrainedConfig:
    """Qwen2.5-7B. A new configuration at each call: what a test changes in it reaches no other
    test. `changes` make it another size.
    """
    return AutoConfig.for_model("qwen2", **{**QWEN_7B, **changes})
