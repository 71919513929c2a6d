"""Reads a decoder layer of transformers: a `LayerParts`, or why it has no hand-written function.

What can be read from the modules is read there: which norms there are and where, biases, widths,
heads, experts. What only the code says stands in `families`. Nothing of this is believed: at the
first call `proof` compares the function that is made from it with the layer's own code.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from longfactory.memory.layer.description import (
    Latent,
    LayerDescription,
    LayerParts,
    Norm,
    Rotary,
)
from longfactory.memory.layer.families import FAMILIES, OTHERS, Family
from longfactory.memory.layer.mixtures import MixtureBeside, Sum
from longfactory.memory.layer_ops import ACTIVATIONS, GATHERED
from longfactory.sp.hf import layer_types
from longfactory.sp.recurrent.layers import LAYERS

_NORMS = (
    {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    {"norm1_after": "post_attention_layernorm", "norm2_after": "post_feedforward_layernorm"},
    {
        "norm1": "input_layernorm",
        "norm1_after": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "norm2_after": "post_feedforward_layernorm",
    },
    {
        "norm1": "input_layernorm",
        "norm1_after": "post_self_attn_layernorm",
        "norm2": "post_attention_layernorm",
        "norm2_after": "post_mlp_layernorm",
    },
    {"norm1": "input_layernorm"},  # parallel
    {"norm1": "operator_norm", "norm2": "ffn_norm"},
    {
        "norm1": "operator_norm",
        "norm1_after": "post_operator_norm",
        "norm2": "ffn_norm",
        "norm2_after": "post_ffn_norm",
    },
    {"norm1": "input_layernorm", "norm2": "pre_feedforward_layernorm"},
    {
        "norm1": "input_layernorm",
        "norm1_after": "post_attention_layernorm",
        "norm2": "pre_mlp_layernorm",
        "norm2_after": "post_mlp_layernorm",
    },
    {
        "norm1": "input_layernorm",
        "norm1_after": "post_norm1",
        "norm2": "post_attention_layernorm",
        "norm2_after": "post_norm2",
    },
    {"norm1": "input_layernorm", "norm2": "pre_ff_layernorm"},
)
"""The norms of a layer, by our names and transformers'."""
_MLPS = (
    ("mlp",),
    ("feed_forward",),
    ("block_sparse_moe",),
    ("shared_mlp",),
    ("block_sparse_moe", "shared_mlp"),
)
"""The children of a layer whose sum is what its MLP gives."""
_BESIDE = {
    "norm1": "input_layernorm",
    "norm1_after": "post_attention_layernorm",
    "norm2_after": "post_feedforward_layernorm",
}
"""The norms of a layer with experts beside its MLP (`MixtureBeside`), which has others inside."""
_GATES = ("g_proj", "gate_proj")
"""What an attention module calls the linear of its output gate."""
_TOKEN_INPUT = {
    "input_gate": "per_layer_input_gate",
    "input_up": "per_layer_projection",
    "input_norm": "post_per_layer_input_norm",
}
"""What belongs to a token's own input."""
_HEADS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_OUT_HEADS = {**_HEADS, "o": "out_proj"}
_HEAD_NORMS = {
    "q_norm": ("q_norm", "q_layernorm", "query_layernorm"),
    "k_norm": ("k_norm", "k_layernorm", "key_layernorm"),
}
_JOINT_HEADS = {"qkv": "qkv_proj", "o": "o_proj"}
_LATENT = {"kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "o": "o_proj"}
_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_NUMBERED_GATED = {"gate": "w1", "up": "w3", "down": "w2"}
_JOINT_GATED = {"gate_up": "gate_up_proj", "down": "down_proj"}
_INPUT_GATED = {"gate_up": "input_linear", "down": "output_linear"}


class Unknown(Exception):
    """Why a layer has no hand-written function."""


def recognise(layer: nn.Module) -> LayerParts | str:
    """A decoder layer's parts, or why it has no hand-written function. Reads no weight: it may be
    on the meta device, inside PEFT or sharded.
    """
    try:
        return _recognise(layer)
    except Unknown as reason:
        return str(reason)
    except AttributeError as error:  # another version of transformers
        return f"{type(layer).__name__} does not have the expected structure: {error}"


def family_of(layer: nn.Module) -> str | None:
    """The family in `FAMILIES` that a decoder layer's code is of."""
    code = _code_of(layer)
    return code if code in FAMILIES else None


def _code_of(layer: nn.Module) -> str:
    """NAME of the module of transformers that a layer's class stands in,
    `transformers.models.NAME.modeling_NAME`; empty where it stands elsewhere.
    """
    # FSDP2 makes a subclass
    kinds = (k for k in type(layer).__mro__ if not k.__module__.startswith("torch.distributed"))
    parts = next(kinds).__module__.split(".")
    return parts[-2] if parts[:2] == ["transformers", "models"] else ""


def _recognise(layer: nn.Module) -> LayerParts:
    name = type(layer).__name__.removeprefix("FSDP")
    code = _code_of(layer)
    family = FAMILIES.get(code)
    if family is None:
        raise Unknown(f"{name}: {OTHERS.get(code, 'its family has no hand-written layer')}")
    nothing = (nn.Dropout, nn.Identity)
    children = {n for n, m in layer.named_children() if not isinstance(m, nothing)}
    attention: Any = getattr(layer, "self_attn", None)
    if attention is None or getattr(layer, "block_type", "") in LAYERS:
        raise Unknown(f"{name} has no softmax attention")
    own_input = _take(layer, _TOKEN_INPUT) or {}
    if own_input:
        children -= {*_TOKEN_INPUT.values(), "act_fn"}
    found = _places(layer, children - {"self_attn"})
    if found is None:
        raise Unknown(f"{name} has other parts than expected ({', '.join(sorted(children))})")
    mlp, places = found
    _no_dropout(layer, name)
    for module in layer.modules():
        if type(module).__module__.startswith("peft.utils"):  # a copy that is trained, beside it
            raise Unknown(f"{name} holds a {type(module).__name__}")
    norms = {ours: getattr(layer, theirs) for ours, theirs in places.items()}
    linears: dict[str, Any] = {}
    fields = _attention(attention, family, linears, norms)
    fields |= _mlp(mlp, name, family, attention.config, linears)
    if own_input:
        fields["token_input"] = _activation(family, attention.config)
        norms["input_norm"] = own_input.pop("input_norm")
        linears |= own_input
    for part, linear in linears.items():
        if (reason := unknown_linear(linear)) is not None:
            raise Unknown(f"its {_theirs(part)} {reason}")
    fields["norms"] = tuple((ours, _norm(norm, family)) for ours, norm in norms.items())
    scalar = getattr(layer, "layer_scalar", None) is not None
    shape = LayerDescription(
        parallel=len(places) == 1,
        residual=_residual(layer),
        scalar=scalar,
        pair=family.pair,
        **fields,
    )
    opaque = mlp if shape.activation is None else None
    window = _window(attention, family)
    return LayerParts(shape, linears, norms, opaque, attention, float(attention.scaling), window)


def _residual(layer: Any) -> float:
    given = getattr(layer, "residual_multiplier", None)
    return float(getattr(layer, "residual_scale", 1.0) if given is None else given)


def _places(layer: nn.Module, children: set[str]) -> tuple[nn.Module, dict[str, str]] | None:
    """A layer's MLP and its norms by our names, where these are all of its children but for
    attention.
    """
    for names in _MLPS:
        for norms in _NORMS:
            if children == {*names, *norms.values()}:
                parts = [getattr(layer, n) for n in names]
                return (parts[0] if len(parts) == 1 else Sum(*parts)), norms
    if children == {*MixtureBeside.PARTS, *_BESIDE.values()}:
        return MixtureBeside(layer), _BESIDE
    return None


def _window(attention: Any, family: Family) -> int | None:
    if family.window is None or getattr(attention, "is_sliding", True) is False:
        return None
    if family.window == "module":
        return getattr(attention, "sliding_window", None)
    config = attention.config
    if family.window == "type" and layer_types(config)[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _no_dropout(layer: nn.Module, name: str) -> None:
    """Of adapters their linear says it."""
    active = any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.children())
    if active or any(getattr(m, "residual_dropout", 0.0) for m in layer.modules()):
        raise Unknown(f"{name} has dropout")


def _norm(module: Any, family: Family) -> Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or getattr(module, "bias", None) is not None:
        raise Unknown(f"its norm is a {type(module).__name__}")
    return Norm(float(eps), **family.norm)


def _take(module: Any, names: dict[str, str]) -> dict[str, Any] | None:
    """The children that have these names, by ours; None where one is missing."""
    found = {ours: getattr(module, theirs, None) for ours, theirs in names.items()}
    return None if any(child is None for child in found.values()) else found


def _attention(
    module: Any, family: Family, linears: dict[str, Any], norms: dict[str, nn.Module]
) -> dict[str, Any]:
    if getattr(module, "kv_lora_rank", None):
        return _latent_attention(module, family, linears, norms)
    if getattr(module, "is_kv_shared_layer", False) or getattr(
        module, "store_full_length_kv", False
    ):
        raise Unknown("its layers share keys and values")
    if getattr(module.config, "clip_qkv", None):
        raise Unknown("its queries, keys and values are clipped")
    dim = int(module.head_dim)
    gate = _gate(module, family, linears)
    beside = gate is not None and "g" not in linears
    rows: tuple[tuple[str, str, int, int], ...] = ()
    found = _take(module, _HEADS) or _take(module, _OUT_HEADS)
    joint = None if found is not None else _take(module, _JOINT_HEADS)
    if found is not None:
        kv_heads = _outputs(found["k"]) // dim
        heads = _outputs(found["q"]) // dim // (2 if beside else 1)
    elif joint is not None:
        found, heads = joint, int(module.config.num_attention_heads)
        kv_heads = int(module.num_key_value_heads)
        q, k = heads * dim, (heads + kv_heads) * dim
        end = k + kv_heads * dim
        rows = (("q", "qkv", 0, q), ("k", "qkv", q, k), ("v", "qkv", k, end))
    else:
        found = _take(module, {n: m for n, m in _HEADS.items() if n != "v"})
        if found is None:
            raise Unknown(f"{type(module).__name__} has other projections than expected")
        # values are the keys before their norm
        kv_heads, heads = _outputs(found["k"]) // dim, _outputs(found["q"]) // dim
        rows = (("v", "k", 0, kv_heads * dim),)
    linears |= found
    for name, others in _HEAD_NORMS.items():
        found_norms = (getattr(module, other, None) for other in others)
        if (norm := next((n for n in found_norms if n is not None), None)) is not None:
            norms[name] = norm
    if (v_norm := getattr(module, "v_norm", None)) is not None:
        if getattr(v_norm, "with_scale", True):
            raise Unknown("its values have a norm")
        norms["v_norm"] = v_norm
    rotary = Rotary(family.pairs, False, family.angles) if family.turns(module) else None
    softcap = module.attn_logit_softcapping if family.softcap else None
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "value_dim": dim,
        "rotary": rotary,
        "softcap": softcap,
        "sinks": getattr(module, "sinks", None) is not None,
        "output_gate": gate,
        "whole_norm": family.whole_norm,
        "norm_of_turned": family.norm_of_turned,
        "rows": rows,
        "query_scale": _query_scale(module.config) if family.query_scale else None,
    }


def _gate(module: Any, family: Family, linears: dict[str, Any]) -> str | None:
    """`LayerDescription.output_gate`; a linear of its own is put to the others."""
    for name in _GATES:
        if getattr(module, name, None) is not None:
            linears["g"] = getattr(module, name)
            return family.output_gate or "sigmoid"
    return family.output_gate


def _query_scale(config: Any) -> tuple[float, float] | None:
    rope = config.rope_parameters
    beta = rope.get("llama_4_scaling_beta")
    return None if beta is None else (float(beta), float(rope["original_max_position_embeddings"]))


def _latent_attention(
    module: Any, family: Family, linears: dict[str, Any], norms: dict[str, nn.Module]
) -> dict[str, Any]:
    found = _take(module, _LATENT)
    if found is None:
        raise Unknown(f"{type(module).__name__} has other projections than expected")
    linears |= found
    gate = _gate(module, family, linears)
    query_rank = int(getattr(module, "q_lora_rank", None) or 0)
    if query_rank:
        linears |= {"q_a": module.q_a_proj, "q_b": module.q_b_proj}
        norms["q_a_norm"] = module.q_a_layernorm
    else:
        linears["q"] = module.q_proj
    norms["kv_a_norm"] = module.kv_a_layernorm
    gathered = bool(getattr(module.config, "rope_interleave", False))
    turns = Rotary(GATHERED if gathered else family.pairs, True, family.angles)
    plain, rotary = int(module.qk_nope_head_dim), int(module.qk_rope_head_dim)
    return {
        "heads": int(module.num_heads),
        "kv_heads": int(module.num_heads),
        "head_dim": plain + rotary,
        "value_dim": int(module.v_head_dim),
        "rotary": turns if family.turns(module) else None,
        "output_gate": gate,
        "latent": Latent(int(module.kv_lora_rank), plain, rotary, query_rank),
        "query_scale": _query_scale(module.config) if family.query_scale else None,
    }


def _mlp(
    module: Any, name: str, family: Family, config: Any, linears: dict[str, Any]
) -> dict[str, Any]:
    if isinstance(module, (Sum, MixtureBeside)) or any(
        "experts" in n or "router" in n for n, _ in module.named_children()
    ):
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
            raise Unknown(f"{name} has dropout")
        return {"activation": None}
    forms = (_GATED, _JOINT_GATED, _NUMBERED_GATED, _INPUT_GATED)
    found = next((f for form in forms if (f := _take(module, form))), None)
    if found is None:
        raise Unknown(f"{name} has an MLP of another shape")
    if getattr(module, "limit", math.inf) != math.inf:
        raise Unknown(f"{name} has an MLP that cuts large numbers off")
    linears |= found
    return {"activation": _activation(family, getattr(module, "config", config))}


def _activation(family: Family, config: Any) -> str:
    given = (
        family.activation
        or getattr(config, "hidden_activation", None)
        or getattr(config, "hidden_act", None)
    )
    if given not in ACTIVATIONS:
        raise Unknown(f"its activation is {given}")
    return ACTIVATIONS[given]


def _theirs(part: str) -> str:
    names = {**_HEADS, **_JOINT_HEADS, **_LATENT, **_GATED, **_JOINT_GATED, **_TOKEN_INPUT}
    return names.get(part, f"{part}_proj")


def _outputs(linear: Any) -> int:
    return int(getattr(linear, "base_layer", linear).out_features)


# ---- linear maps ---------------------------------------------------------------------------------


def is_lora(linear: Any) -> bool:
    """Whether it is PEFT's wrapper of a linear."""
    module = type(linear).__module__
    return module.startswith("peft.tuners.lora") and hasattr(linear, "base_layer")


def is_four_bit(linear: Any) -> bool:
    """Whether it is a linear of bitsandbytes with weights of four bits."""
    return type(linear).__module__.startswith("bitsandbytes") and hasattr(linear, "quant_state")


def unknown_linear(linear: Any) -> str | None:
    """Why this is neither a plain linear nor one with LoRA or DoRA, or None."""
    base = linear.base_layer if is_lora(linear) else linear
    if type(base) is not nn.Linear and not is_four_bit(base):
        return f"is a {type(linear).__name__}"
    if base is linear:
        return None
    if getattr(linear, "fan_in_fan_out", False):
        return f"is a {type(linear).__name__} of a transposed weight"
    variants = {type(variant).__name__ for variant in linear.lora_variant.values()}
    if variants - {"DoraLinearVariant"}:
        return f"has {', '.join(sorted(variants))}"
    if any(getattr(m, "p", 0.0) > 0 for m in linear.lora_dropout.values()):
        return "has lora_dropout"
    if any(linear.lora_bias.values()):
        return "has lora_bias"
    return None
