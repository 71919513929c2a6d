"""Folders of tiny models for runs of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longfactory_dev.tiny_models import tiny_config
from make_model import make_model


def with_tiny(sft_keys: dict[str, Any], family: str, **fields: Any) -> dict[str, Any]:
    """The keys with a tiny model of a family: its configuration and a tokenizer.

    Args:
        fields: of its configuration.
    """
    folder = Path(sft_keys["output_dir"]).parent / family
    if not folder.exists():
        make_model("tiny", folder, vocabulary=600)
        tiny_config(
            family,
            vocab_size=1024,
            max_position_embeddings=4096,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            **fields,
        ).save_pretrained(folder)
    return {**sft_keys, "model_name_or_path": str(folder)}
