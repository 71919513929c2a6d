"""Tiny random models of any family of transformers, for tests and for the sweep over families.

Four layers, a few thousand parameters, and windows, chunks and lengths short enough to matter in a
row of 64 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longfactory.sp.text_model import model_class

# Tiny value -> the fields of configurations that take it. Only fields that a configuration has are
# set.
_VALUES: tuple[tuple[Any, str], ...] = (
    (256, "vocab_size vocab_size_per_layer_input"),
    (
        0,
        (
            "pad_token_id num_kv_shared_layers num_nextn_predict_layers num_mtp_layers"
            " emb_neighbor_num"
        ),
    ),
    (
        1,
        (
            "bos_token_id n_group topk_group n_shared_experts num_shared_experts"
            " first_k_dense_replace num_dense_layers moe_layer_start_index first_k_dense"
            " mamba_n_groups ngram_vocab_size_ratio num_blocks"
        ),
    ),
    (
        2,
        (
            "eos_token_id encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads"
            " num_global_key_value_heads num_experts_per_tok moe_top_k moe_topk moe_k"
            " num_experts_per_token top_k_experts zero_expert_num max_window_layers mamba_expand"
            " n_mamba_heads index_n_heads num_codebooks num_query_groups"
        ),
    ),
    (512, "max_position_embeddings n_positions max_seq_len max_target_positions"),
    (
        64,
        (
            "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size embed_dim conv_dim"
            " block_dim lru_width mup_base_width dim_model_base hidden_dim ext_pw_out_channel"
            " nemo_conv_channels depthwise_separable_out_channel"
        ),
    ),
    (
        4,
        (
            "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads"
            " n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
            " swa_num_attention_heads num_experts num_local_experts n_routed_experts"
            " moe_num_experts floor_scale linear_num_key_heads"
        ),
    ),
    (
        16,
        (
            "head_dim d_kv kv_channels attention_head_dim swa_head_dim swa_v_head_dim"
            " global_head_dim kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank mamba_d_head"
            " mamba_chunk_size mamba_head_dim chunk_size index_head_dim"
        ),
    ),
    (
        96,
        (
            "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dff"
            " intermediate_size_mlp dense_intermediate_size block_ff_dim"
        ),
    ),
    (
        32,
        (
            "shared_intermediate_size moe_intermediate_size moe_shared_expert_intermediate_size"
            " shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank audio_vocab_size"
        ),
    ),
    (
        8,
        (
            "qk_rope_head_dim sliding_window attention_chunk_size window_size swa_window"
            " sliding_window_size local_window_size local_attention attention_window_size"
            " rotary_dim hidden_size_per_layer_input linear_num_value_heads linear_key_head_dim"
            " linear_value_head_dim mamba_n_heads mamba_d_state mamba_num_heads ssm_state_size"
            " mamba_state_dim state_size laurel_rank index_topk"
        ),
    ),
    (True, "use_sliding_window"),
    (128, "mamba_d_ssm"),
    (False, "block_auto_adjust_ff_dim use_cache tie_word_embeddings"),
    (None, "activation_sparsity_pattern cross_attention_hidden_size"),
)
_TINY = {name: value for value, names in _VALUES for name in names.split()}

# What the rules above do not reach.
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "no_rope_layers": [1, 1, 0, 0],
        "layer_types": [
            "chunked_attention",
            "full_attention",
            "chunked_attention",
            "full_attention",
        ],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4}
            for k in ("sliding_attention", "full_attention")
        }
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "bailing_hybrid": {"linear_num_heads": 4, "linear_head_dim": 8, "num_expert_group": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8},
    "nemotron_h": {"n_groups": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_headdim": 16,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "xlm": {"emb_dim": 64, "n_words": 256},
    "reformer": {"is_decoder": True},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 8,
        }
    },
}

OVERRIDES |= {
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 8,
        },
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "dots3_note_text": {
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 24,
        "swa_v_head_dim": 16,
    },
    "mistral_large4_text": {"indexer_types": ["full", "shared", "full", "full"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
}

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
"""Sections of a rotary embedding in three dimensions, for heads of 16."""
OVERRIDES |= {
    "glm4v_moe_text": {
        "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": _MROPE,
        "moe_intermediate_size": [32, 32],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
}

# Of a configuration of several parts: fields of the whole ("") and of its parts.
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "chameleon": {"": {"vocabulary_map": {"<image>": 200}}},
    "dots3_note": {
        "vision_config": {
            "pyramid_num_routed": [-1, -1, 4, 4],
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
            "adapter_merge_size": 2,
            "spatial_merge_size": 2,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {"": {"vocabulary_map": {"<image>": 200, "<|extra_200|>": 201}}},
    "granite4_vision": {"": {"deepstack_layer_map": []}},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "muse_spark": {
        "audio_config": {"out_hidden_size": 64},
        "vision_config": {"out_hidden_size": 64},
    },
}


def real_heads(family: str) -> dict[str, Any]:
    """Fields of a tiny configuration's text part that give its attention the head dims of the
    family's default configuration; all else stays tiny.
    """
    default = CONFIG_MAPPING[family]().get_text_config()
    values = default.to_dict()
    heads = next(
        (
            values[k]
            for k in ("num_attention_heads", "n_head", "n_heads", "num_heads")
            if k in values
        ),
        getattr(default, "num_attention_heads", 0),
    )
    if not heads:
        return {}
    dim = values.get("head_dim") or getattr(default, "head_dim", None)
    if not isinstance(dim, int):
        dim = default.hidden_size // heads
    fields = {
        key: values[key]
        for key in (*_LATENT, *_LINEAR, "swa_head_dim", "swa_v_head_dim", "global_head_dim", "d_kv")
        if isinstance(values.get(key), int)
    }
    if "qk_rope_head_dim" in fields:
        if family in OVERRIDES and "rope_parameters" in OVERRIDES[family]:
            return {**fields, "head_dim": fields["qk_rope_head_dim"]}  # all of it turns there
        return {**fields, **({"head_dim": values["head_dim"]} if "head_dim" in values else {})}
    if "head_dim" in values or "kv_channels" in values or "attention_head_dim" in values:
        named = ("head_dim", "kv_channels", "attention_head_dim")
        fields |= {key: dim for key in named if key in values}
    else:  # the width over the number of heads, which is 4
        has = set(values) | set(type(default).attribute_map)
        fields |= {k: 4 * dim for k, v in _TINY.items() if v == 64 and k in has}
        fields = {k: v for k, v in fields.items() if k not in type(default).attribute_map}
    if "rotary_dim" in values:
        fields["rotary_dim"] = min(int(values["rotary_dim"] or dim), dim)
    if "mamba_d_head" in values and "hidden_size" in fields:
        inner = _TINY["mamba_expand"] * fields["hidden_size"]
        fields["mamba_d_head"] = inner // _TINY["mamba_n_heads"]
    if "attention_multiplier" in values:  # 1.0 by default, which no trained model has
        fields["attention_multiplier"] = 1 / dim
    rope = values.get("rope_parameters") or {}
    tiny = getattr(tiny_config(family).get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope:
        fields["rope_parameters"] = rope
    elif "mrope_section" in tiny:  # of heads of 16
        section = [part * dim // 16 for part in tiny["mrope_section"]]
        fields["rope_parameters"] = {**tiny, "mrope_section": section}
    return fields


_LINEAR = ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim")
"""Of recurrences: the norm of a narrow head's output divides by what may be nearly nothing."""
_LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of a few thousand parameters. `overrides` are fields of its text part.

    Raises:
        Exception: whatever the configuration's own checks raise where the rules do not fit it.
    """
    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config()
    fields = {**OVERRIDES.get(text.model_type, {}), **overrides}
    parts = {}
    for key in kind.sub_configs:
        part = getattr(default, key, None)
        if isinstance(part, PreTrainedConfig):
            own = PARTS.get(family, {}).get(key, {})
            parts[key] = _shrunk(
                type(part), part, {**own, **fields} if part is text else own
            ).to_dict()
    whole = PARTS.get(family, {}).get("", {})
    return (
        _shrunk(kind, default, {**parts, **whole, **fields})
        if text is default
        else kind(**parts, **whole)
    )


def _computed(kind: type[PreTrainedConfig], name: str) -> bool:
    """Whether a configuration makes a field of its others."""
    return isinstance(getattr(kind, kind.attribute_map.get(name, name), None), property)


def _shrunk(
    kind: type[PreTrainedConfig], default: PreTrainedConfig, overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    values = default.to_dict()
    has = set(values) | set(kind.attribute_map)
    fields = {k: v for k, v in _TINY.items() if k in has and k not in kind.attribute_map}
    for key, value in values.items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            fields[key] = 0.0
    if getattr(default, "qk_rope_head_dim", None):
        fields["num_key_value_heads"] = 4
        if "head_dim" in fields:
            fields["head_dim"] = 8  # of latent attention: the rotated part
    if "mrope_section" in getattr(kind, "ignore_keys_at_rope_validation", ()):
        fields["rope_parameters"] = dict(_MROPE)
    types = getattr(default, "layer_types", None)
    if types and "layer_types" in has and not _computed(kind, "layer_types"):
        kinds = list(dict.fromkeys(types))
        if kinds == ["full_attention"] and "sliding_window" in has:
            kinds = ["sliding_attention", "full_attention"]
        fields["layer_types"] = [kinds[i % len(kinds)] for i in range(4)]
    fields.update(overrides)
    return kind(**fields)


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    fan_in: int = 64,
    **overrides: Any,
) -> PreTrainedModel:
    """Random weights, large enough that attention changes the logits by more than a rounding error.
    The same on every rank.

    Args:
        fan_in: weights of maps of more inputs are as large as those of this many. In a wider model
            scores grow with the square of what is left out, until attention sees one key alone and
            bf16 tells nothing: such a model needs its width here.
    """
    config = tiny_config(family, **overrides)
    torch.manual_seed(seed)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).from_config().parameters())
    if size > 20_000_000:
        raise ValueError(f"the tiny model has {size / 1e6:.0f} million parameters")
    model = (
        model_class(config)
        .from_config(attn_implementation="eager", experts_implementation="eager")
        .to(dtype)
        .eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.copy_(
                    torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    / math.sqrt(min(p.shape[-1], fan_in))
                )
            else:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model
