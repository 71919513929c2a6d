"""What a family's code does and no module shows: the entries that `recognise` reads a layer by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from longfactory.memory.layer_ops import GATHERED, INTERLEAVED

PLAIN = {"mean": False, "zero_centred": False, "wide_weight": False}
WIDE = {**PLAIN, "wide_weight": True}
ZERO_CENTRED = {**WIDE, "zero_centred": True}
LAYER_NORM = {**WIDE, "mean": True}


def _always(attention: Any) -> bool:
    return True


def _only_in_windows(attention: Any) -> bool:
    return attention.sliding_window is not None


def _but_beside_windows(attention: Any) -> bool:
    """Everywhere but in the full layers of a model that has windows."""
    return attention.sliding_window is None or attention.is_sliding


def _by_flag(attention: Any) -> bool:
    return bool(attention.use_rope)


def _never(attention: Any) -> bool:
    return False


def _where_the_model_has_angles(attention: Any) -> bool:
    return getattr(attention.config, "rope_parameters", None) is not None


def _where_the_model_says_rope(attention: Any) -> bool:
    return getattr(attention.config, "position_embedding_type", None) == "rope"


@dataclasses.dataclass(frozen=True)
class Family:
    """What the code of a family's modules does and no module shows.

    Attributes:
        norm: how its norms multiply by their weight.
        pairs, angles: see `Rotary`.
        turns: whether an attention module turns queries and keys.
        window: where the window comes from that its attention is given: the "module", the "config",
            the config by the layer's "type", or None.
        softcap: its attention is given `attn_logit_softcapping`.
        output_gate, whole_norm, norm_of_turned: see `LayerDescription`. A gate by a linear of its
            own is seen, and is a sigmoid where nothing is said here.
        activation: of its MLP, where no configuration says it.
        query_scale: its queries grow with their position (`llama_4_scaling_beta`).
        pair: see `LayerDescription`.
    """

    norm: dict[str, bool] = dataclasses.field(default_factory=lambda: PLAIN)
    pairs: str = "halves"
    angles: str = "twice"
    turns: Callable[[Any], bool] = _always
    window: str | None = None
    softcap: bool = False
    output_gate: str | None = None
    whole_norm: bool = False
    norm_of_turned: bool = False
    activation: str | None = None
    query_scale: bool = False
    pair: bool = False


FAMILIES: dict[str, Family] = {
    "afmoe": Family(WIDE, window="module", turns=_only_in_windows),
    "aria": Family(),
    "axk1": Family(),
    "bailing_hybrid": Family(pairs=GATHERED),
    "bamba": Family(pair=True),
    "cohere": Family(LAYER_NORM, pairs=INTERLEAVED, angles="repeated"),
    "cohere2": Family(
        LAYER_NORM,
        pairs=INTERLEAVED,
        angles="repeated",
        turns=_only_in_windows,
        window="module",
    ),
    "cohere2_moe": Family(
        LAYER_NORM, pairs=INTERLEAVED, angles="repeated", turns=_only_in_windows, window="module"
    ),
    "cohere_compass": Family(LAYER_NORM, window="module"),
    "cwm": Family(window="module"),
    "deepseek_v2": Family(pairs=INTERLEAVED, angles="once"),
    "deepseek_v3": Family(),
    "dots1": Family(window="module"),
    "ernie4_5": Family(pairs=INTERLEAVED),
    "ernie4_5_moe": Family(pairs=INTERLEAVED),
    "exaone4": Family(window="module", turns=_but_beside_windows),
    "exaone_moe": Family(window="module", turns=_but_beside_windows),
    "flex_olmo": Family(WIDE, whole_norm=True),
    "flint": Family(WIDE, window="module", turns=_only_in_windows),
    "gemma": Family(ZERO_CENTRED),
    "gemma2": Family(ZERO_CENTRED, window="module", softcap=True),
    "gemma3": Family(ZERO_CENTRED, window="module"),
    "gemma4": Family(WIDE, window="module"),
    "gemma4_unified": Family(WIDE, window="module"),
    "glm": Family(pairs=INTERLEAVED),
    "glm4": Family(pairs=INTERLEAVED),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(),
    "gpt_oss": Family(WIDE, angles="once", window="module"),
    "granite": Family(),
    "granite_docling": Family(),
    "granite_swa": Family(window="module"),
    "granitemoe": Family(),
    "granitemoe_swa": Family(window="module"),
    "granitemoehybrid": Family(turns=_where_the_model_says_rope),
    "granitemoeshared": Family(),
    "helium": Family(WIDE, pairs=INTERLEAVED),
    "hunyuan_v1_dense": Family(norm_of_turned=True),
    "hunyuan_v1_moe": Family(norm_of_turned=True),
    "hunyuan_vl": Family(norm_of_turned=True),
    "hy_v3": Family(),
    "hyperclovax": Family(),
    "jamba": Family(turns=_never),
    "kimi_linear": Family(turns=_never),
    "kolibri1": Family(window="module", turns=_but_beside_windows),
    "laguna": Family(window="module", output_gate="softplus"),
    "lfm2": Family(activation="silu"),
    "lfm2_moe": Family(activation="silu"),
    "lfm3": Family(window="module", activation="silu"),
    "llama": Family(),
    "mellum": Family(window="module"),
    "minicpm3": Family(),
    "minimax_m2": Family(whole_norm=True),
    "ministral": Family(window="module"),
    "ministral3": Family(window="config", query_scale=True),
    "mistral": Family(window="config"),
    "mistral4": Family(query_scale=True),
    "mixtral": Family(window="config"),
    "mllama": Family(),
    "olmo2": Family(WIDE, whole_norm=True),
    "olmo3": Family(WIDE, whole_norm=True, window="module"),
    "olmo_hybrid": Family(WIDE, whole_norm=True, turns=_where_the_model_has_angles),
    "olmoe": Family(window="config", whole_norm=True),
    "paddleocr_vl": Family(),
    "phi3": Family(window="config"),
    "phi4_multimodal": Family(window="config"),
    "qwen2": Family(window="module"),
    "qwen2_5_omni": Family(window="module"),
    "qwen2_5_vl": Family(window="module"),
    "qwen2_moe": Family(window="type"),
    "qwen2_vl": Family(window="module"),
    "qwen3": Family(window="module"),
    "qwen3_5": Family(ZERO_CENTRED, output_gate="sigmoid"),
    "qwen3_5_moe": Family(ZERO_CENTRED, output_gate="sigmoid"),
    "qwen3_moe": Family(window="module"),
    "qwen3_next": Family(ZERO_CENTRED, output_gate="sigmoid"),
    "qwen3_omni_moe": Family(window="module"),
    "qwen3_vl": Family(),
    "qwen3_vl_moe": Family(),
    "seed_oss": Family(),
    "smollm3": Family(window="module", turns=_by_flag),
    "solar_open": Family(),
    "step3p7": Family(ZERO_CENTRED, window="module"),
    "vaultgemma": Family(ZERO_CENTRED, window="module", softcap=True),
    "youtu": Family(),
}
"""By the name of transformers' module, `transformers.models.NAME.modeling_NAME`."""

_NO_GATE = "its MLP has no gate"
_INDEXER = "an indexer chooses the keys that its queries see"
OTHERS: dict[str, str] = {
    "apertus": _NO_GATE,
    "arcee": _NO_GATE,
    "axk2": _INDEXER,
    "beam": "the gate of its attention has a bias for each head",
    "biogpt": _NO_GATE,
    "bitnet": "norms stand inside its attention and its MLP",
    "cosmos3_edge": _NO_GATE,
    "ctrl": _NO_GATE,
    "dbrx": "attention and its norms are a module of their own, and its experts another",
    "deepseek_v32": _INDEXER,
    "diffllama": "its attention is the difference of two",
    "dots3_note": _INDEXER,
    "falcon_h1": "attention and a recurrence stand side by side at one input",
    "gemma3n": "a token has several hidden states",
    "glm_moe_dsa": _INDEXER,
    "gpt2": _NO_GATE,
    "gpt_bigcode": _NO_GATE,
    "gpt_neox": _NO_GATE,
    "hrm_text": "its norms have no weights",
    "hy_v4": _INDEXER,
    "jais2": _NO_GATE,
    "jetmoe": "its attention is a mixture of experts",
    "llama4": "its layers see chunks, and queries and keys have norms without weights",
    "longcat_flash": "a layer has two attentions and two MLPs beside its experts",
    "mimo_v2_flash": "its values have another width than its keys, and a factor",
    "minimax": "its residuals are normed hidden states, and have factors",
    "minimax_m3_vl": _INDEXER,
    "mistral_large4": _INDEXER,
    "nanochat": _NO_GATE,
    "nemotron": _NO_GATE,
    "nemotron_h": "a layer is one mixer: its attention has no MLP behind it",
    "olmo": "its norms have no weights",
    "opt": _NO_GATE,
    "persimmon": _NO_GATE,
    "phi": _NO_GATE,
    "phimoe": "its norms have biases",
    "stablelm": "its norms have biases",
    "starcoder2": _NO_GATE,
    "whisper": _NO_GATE,
    "zamba": "one attention, of twice the layer's width, serves several layers",
    "zamba2": "one attention, of twice the layer's width, serves several layers",
}
"""Why other families' layers run as transformers wrote them."""
