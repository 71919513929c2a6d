"""The configuration of Qwen2.5-7B, for tests that count its bytes and never load its weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def qwen_7b(**changes: Any) -> PretrainedConfig:
    """A new configuration at each call: what a test changes in it reaches no other test. `changes`
    make it another size.
    """
    return AutoConfig.for_model("qwen2", **{**QWEN_7B, **changes})
