"""Every causal language model of the installed transformers, tiny and random: exact under sequence parallelism, or refused.

    python -m longfactory.sp.families [model_type ...] [--size 2] [--write docs/models.md]

A family is built with four layers and a few thousand parameters, with windows, chunks and lengths short enough to matter. A row of two
documents is spread over the ranks; logits and the gradient of every parameter are compared with the model computing each document
alone, unsharded, with its own eager attention.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import guard as start_guard
from . import hf
from .collectives import shard
from .context import SequenceParallel, alignment
from .layout import Segment
from .plan import plan as make_plan

Verdict = Literal["exact", "refused", "wrong", "not built"]
DOCUMENTS = (21, 38)
"""Lengths. With the padding, 64 tokens on 2 or 4 ranks."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Of the largest difference over the largest value. transformers computes norms and rotary angles in float32, whatever the model's type."""


@dataclasses.dataclass(frozen=True)
class Result:
    family: str
    verdict: Verdict
    detail: str
    """What was checked, or why it was refused."""
    logits: float = math.nan
    gradients: float = math.nan
    aux_loss: bool = False
    """Whether the model can add a router's auxiliary loss of its own, which a shard would compute from its own tokens."""


def families() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# Field of a configuration -> its tiny value. Only fields that the configuration has are set.
_TINY: dict[str, Any] = {
    "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512, "n_positions": 512,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "word_embed_proj_dim": 64, "embedding_size": 64, "embed_dim": 64,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_kv": 16, "kv_channels": 16, "attention_head_dim": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16, "global_head_dim": 16,
    "num_global_key_value_heads": 2, "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96,
    "ffn_hidden_size": 96, "dff": 96, "intermediate_size_mlp": 96, "shared_intermediate_size": 32, "dense_intermediate_size": 96,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_top_k": 2, "moe_topk": 2,
    "moe_k": 2, "num_experts_per_token": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "zero_expert_num": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "first_k_dense": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "o_lora_rank": 16,
    "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "attention_chunk_size": 8, "window_size": 8, "swa_window": 8,
    "sliding_window_size": 8, "local_window_size": 8, "local_attention": 8, "attention_window_size": 8,
    "floor_scale": 4, "rotary_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 0,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 128, "mamba_chunk_size": 16, "mamba_expand": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_state_dim": 8, "n_mamba_heads": 2, "chunk_size": 16,
    "conv_dim": 64, "block_dim": 64, "block_ff_dim": 96, "lru_width": 64, "state_size": 8, "num_nextn_predict_layers": 0, "num_mtp_layers": 0,
    "block_auto_adjust_ff_dim": False, "use_cache": False, "tie_word_embeddings": False, "max_seq_len": 512, "activation_sparsity_pattern": None,
    "laurel_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "mup_base_width": 64, "dim_model_base": 64, "hidden_dim": 64,
    "ngram_vocab_size_ratio": 1, "emb_neighbor_num": 0, "cross_attention_hidden_size": None, "audio_vocab_size": 32, "num_codebooks": 2,
}  # fmt: skip

# What the rules above do not reach.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "no_rope_layers": [1, 1, 0, 0],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "git": {"vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}},
    "ministral3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 8}
    },
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of a few thousand parameters. `overrides` are fields of its text part.

    Raises:
        Exception: whatever the configuration's own checks raise where the rules do not fit it.
    """
    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config()
    fields = {**_OVERRIDES.get(text.model_type, {}), **overrides}
    if text is default:
        return _shrunk(kind, default, fields)
    parts = {}
    for key in kind.sub_configs:
        part = getattr(default, key, None)
        if isinstance(part, PreTrainedConfig):
            parts[key] = _shrunk(type(part), part, fields if part is text else {}).to_dict()
    return kind(**parts)


def _shrunk(kind: type[PreTrainedConfig], default: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
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
    types = getattr(default, "layer_types", None)
    if types and "layer_types" in has and not isinstance(getattr(kind, "layer_types", None), property):
        kinds = list(dict.fromkeys(types))
        if kinds == ["full_attention"] and "sliding_window" in has:
            kinds = ["sliding_attention", "full_attention"]
        fields["layer_types"] = [kinds[i % len(kinds)] for i in range(4)]
    fields.update(overrides)
    return kind(**fields)


def tiny_model(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
    """Random weights, large enough that attention changes the logits by more than a rounding error. The same on every rank."""
    config = tiny_config(family, **overrides)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"the tiny model has {size / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(min(p.shape[-1], 64)))
            else:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def check(family: str, ctx: SequenceParallel, **overrides: Any) -> Result:
    """Builds a family and compares. Collective over the world. Never raises for what the family does."""
    last = ""
    for dtype in (torch.float64, torch.float32):
        try:
            model = tiny_model(family, dtype, **overrides)
        except Exception as error:  # a family that the rules do not fit is reported, not hidden
            return Result(family, "not built", _line(error))
        try:
            alone = _alone(copy.deepcopy(model))
        except Exception as error:
            last = _line(error)
            continue
        return _compare(family, model, alone, ctx, dtype)
    return Result(family, "not built", f"its own forward or backward fails: {last}")


def _compare(
    family: str, model: PreTrainedModel, alone: tuple[Tensor, dict[str, Tensor]], ctx: SequenceParallel, dtype: torch.dtype
) -> Result:
    aux = hasattr(model.config.get_text_config(), "router_aux_loss_coef") or hasattr(model.config.get_text_config(), "output_router_logits")
    try:
        hf.prepare(model, ctx)
        start_guard.guard(model, ctx)
    except ValueError as error:
        return Result(family, "refused", _line(error), aux_loss=aux)
    logits, gradients = _sharded(model, ctx)
    expected, reference = alone
    error_logits = (logits - expected).abs().max() / expected.abs().max()
    scale = max(g.abs().max() for g in reference.values())
    error_gradients = max((gradients[n] - g).abs().max() for n, g in reference.items()) / scale
    tolerance = TOLERANCE[dtype]
    good = bool(error_logits <= tolerance and error_gradients <= tolerance and gradients.keys() == reference.keys())
    return Result(family, "exact" if good else "wrong", _features(model), error_logits.item(), error_gradients.item(), aux)


def _documents(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in DOCUMENTS]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels >= 0
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")


def _shifted(ids: Tensor) -> Tensor:
    return torch.cat([ids[1:], ids.new_full((1,), -100)])


def _vocabulary(model: PreTrainedModel) -> int:
    return min(model.get_input_embeddings().num_embeddings, 200)


def _alone(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [T, V] of the documents one after another, and the gradients of the sum of their losses."""
    outputs = []
    for ids in _documents(_vocabulary(model)):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        _loss(logits, _shifted(ids)).backward()
        outputs.append(logits.detach())
    return torch.cat(outputs), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _sharded(model: PreTrainedModel, ctx: SequenceParallel) -> tuple[Tensor, dict[str, Tensor]]:
    documents = _documents(_vocabulary(model))
    used = sum(DOCUMENTS)
    pad = -used % max(alignment(ctx), 8)
    documents.append(documents[0].new_zeros(pad))
    lengths = [len(d) for d in documents if len(d)]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    row = {"input_ids": torch.cat(documents), "position_ids": torch.cat([torch.arange(n) for n in lengths])}
    labels = torch.cat([_shifted(d) for d in documents[:2]] + [torch.full((pad,), -100)])
    plan = make_plan(ends[-1], [Segment(e - n, e) for n, e in zip(lengths, ends, strict=True)], ctx)
    logits = model(**hf.inputs(row, plan)).logits[0]
    loss = _loss(logits, shard(labels, plan)) + 0.0 * logits.sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = logits.new_zeros(ends[-1], logits.shape[1])
    whole[plan.index] = logits.detach()
    if ctx.size > 1:
        dist.all_reduce(whole, group=ctx.group)
        for g in gradients.values():
            dist.all_reduce(g, group=ctx.group)
    return whole[:used], gradients


def _features(model: PreTrainedModel) -> str:
    """What the checked model has that sequence parallelism could lose."""
    config = model.config.get_text_config()
    types = set(hf.layer_types(config))
    out = []
    if getattr(config, "sliding_window", None) and (types & {"sliding_attention"} or not getattr(config, "layer_types", None)):
        out.append("sliding window")
    if "chunked_attention" in types:
        out.append("chunked attention")
    if "linear_attention" in types:
        out.append("gated delta net")
    if getattr(config, "attn_logit_softcapping", None):
        out.append("soft-cap")
    if any("sink" in n for n, _ in model.named_parameters()):
        out.append("sinks")
    if getattr(config, "kv_lora_rank", None):
        out.append("latent attention")
    if any("experts" in n for n, _ in model.named_parameters()):
        out.append("experts")
    return ", ".join(out)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__
