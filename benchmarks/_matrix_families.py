"""The model families of `matrix.py`: small, with the head dims, windows and experts of the
published models, as checkpoint folders.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

VOCABULARY = 1024
WINDOW = 64
"""Tokens of a sliding window: documents of the matrix are longer."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_ALTERNATING = ["sliding_attention", "full_attention"]
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _TEXT,
    "qwen2": {**_TEXT, "tie_word_embeddings": True},
    "qwen3": _TEXT,
    "qwen3_moe": {**_TEXT, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mistral": {**_TEXT, "sliding_window": WINDOW},
    "phi3": {**_TEXT, "hidden_size": 384, "head_dim": 96, "sliding_window": None},
    "gemma2": {
        **_TEXT,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "tie_word_embeddings": True,
    },
    "glm4": {**_TEXT, "partial_rotary_factor": 0.5},
    "gpt_oss": {
        **_TEXT,
        "head_dim": 64,
        # one attention sink a head: a multiple of 16 bytes in a flat buffer of ZeRO
        "num_attention_heads": 8,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.02,
    },
    "deepseek_v3": {
        **{k: v for k, v in _TEXT.items() if k != "head_dim"},
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
    },
    # Checkpoints with a vision tower, trained on text.
    "gemma3": {
        "text_config": {
            **_TEXT,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "tie_word_embeddings": True,
        },
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 900,
        "boi_token_index": 901,
        "eoi_token_index": 902,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "head_dim": 256,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        "image_token_id": 900,
        "video_token_id": 901,
        "vision_start_token_id": 902,
        "vision_end_token_id": 903,
        "tie_word_embeddings": False,
    },
}


def make_checkpoint(family: str, folder: Path) -> Path:
    """Writes a family's checkpoint as published ones are: bf16 safetensors, config and tokenizer.

    The class is the one that transformers' own table gives the architecture. Matrices are drawn
    with standard deviation 1 / sqrt(fan in), so that every layer changes the logits by more than
    rounding.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from make_model import make_model

    if (folder / "config.json").is_file():
        return folder
    make_model("tiny", folder)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    has_tower = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if has_tower else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter.shape[-2]
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / math.sqrt(max(fan_in, 16)))
            elif not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert hasattr(transformers, written["architectures"][0])
    return folder


def add_value_head(folder: Path) -> None:
    """Gives a checkpoint the value head of a reward model, as LLaMA-Factory writes it."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    hidden = config.get("text_config", config)["hidden_size"]
    weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(3)) / math.sqrt(hidden)
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}
    save_file(head, folder / "value_head.safetensors")
