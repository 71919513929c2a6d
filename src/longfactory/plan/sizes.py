"""Shapes of well-known models by their size, so that a plan needs neither the hub nor a folder."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longfactory.errors import UserError


def _qwen(hidden: int, ffn: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **more,
    }


SMALL = {"vocab_size": 151936, "tie_word_embeddings": True}
GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.5b": ("Qwen2.5-0.5B", _qwen(896, 4864, 24, 14, 2, **SMALL)),
    "1.5b": ("Qwen2.5-1.5B", _qwen(1536, 8960, 28, 12, 2, **SMALL)),
    "3b": ("Qwen2.5-3B", _qwen(2048, 11008, 36, 16, 2, **SMALL)),
    "7b": ("Qwen2.5-7B", _qwen(3584, 18944, 28, 28, 4)),
    "8b": (
        "Llama-3.1-8B",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
    "14b": ("Qwen2.5-14B", _qwen(5120, 13824, 48, 40, 8)),
    "32b": ("Qwen2.5-32B", _qwen(5120, 27648, 64, 40, 8)),
    "72b": ("Qwen2.5-72B", _qwen(8192, 29568, 80, 64, 8)),
    "qwen3-30b-a3b": (
        "Qwen3-30B-A3B",
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": ("gpt-oss-20b", GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt-oss-120b", GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}),
    "gemma-3-12b": (
        "gemma-3-12b (text)",
        GEMMA3
        | {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
    ),
    "gemma-3-27b": (
        "gemma-3-27b (text)",
        GEMMA3
        | {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
        },
    ),
    # transformers' own defaults are this model's
    "deepseek-v3": (
        "DeepSeek-V3",
        {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "max_position_embeddings": 163840,
        },
    ),
}
"""Name -> the model, and what its config.json says that is not transformers' default."""


@contextlib.contextmanager
def model_folder(name: str) -> Iterator[str]:
    """What `model_name_or_path` may be for a name of `SIZES`, the path of a config.json, a folder
    or a hub id. A folder that was made for it is removed at the end.

    Raises:
        UserError: a file that cannot be read, or that is no configuration.
    """
    shape = SIZES.get(name.lower())
    path = Path(name).expanduser()
    if shape is None and not path.is_file():
        yield name
        return
    text = json.dumps(shape[1]) if shape is not None else _read(path)
    with tempfile.TemporaryDirectory(prefix="longfactory-plan-") as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        yield folder


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        known = "model_type" in json.loads(text)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a model's config.json: {error}.") from error
    if not known:
        raise UserError(f"{path} has no model_type, which a model's config.json has.")
    return text
