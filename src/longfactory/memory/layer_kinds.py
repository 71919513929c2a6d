"""The kinds of decoder layers of a model: what one token computes in each, and how far it sees.

Products are counted on the layer's own parameters (`kinds_of`, on a model without storage), so that
latent attention, experts, shared experts, dense layers among sparse ones and linear attention need
no rule each. The configuration says what no parameter shows: the heads of attention, windows,
chunks, and how many experts a token passes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from torch import nn

from longfactory.memory.expert_forms import gates_in_one_kernel, have_biases
from longfactory.memory.layer.description import LayerParts
from longfactory.memory.layer.families import FAMILIES
from longfactory.memory.layer.recognise import recognise
from longfactory.sp.hf import layer_types, values_of_layers
from longfactory.sp.recurrent.heads import head_bytes
from longfactory.sp.recurrent.layers import Mixer, mixer_of
from longfactory.sp.recurrent.rule import CHUNK
from longfactory.sp.routers import routers
from longfactory.sp.text_model import decoder_layers

WINDOW_TILE = 128
"""Keys beyond its window that a query's tile computes: kernels work on blocks of this many keys,
and half of one is masked at each end."""

_MIXERS = re.compile(r"attn|attention|conv|mamba|ssm|mixer|recurrent|temporal|linear")
_EXPERTS = re.compile(r"(^|\.)experts?(\.|$)")
_IN_FLOAT32 = re.compile(r"hidden_states\.(float\(\)|(type|to)\(torch\.float32\))")
_USED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Layers that are alike.

    Attributes:
        heads, kv_heads, head_dim, value_dim: of softmax attention; no heads where there is none.
            Latent attention has as many key heads as heads, once its keys are made.
        reach: keys that a query sees at most; 0 for all before it.
        within_chunk: it sees those of its own chunk of `reach` tokens, not the last `reach`.
        mixer_parameters: linear maps of attention, or of what stands in its place.
        dense_parameters: linear maps of the MLP that every token passes: shared experts and
            routers too.
        expert_parameters: of all routed experts.
        experts, used: routed experts, and those that a token passes.
        parameters: all of the layer.
        hidden: width of the layer's input.
        norms: of the width of the layer's input.
        head_norms: queries and keys are normalised by heads.
        softcap: scores are capped.
        recurrent_flop: of a token in a recurrence and its convolution, forward, beside its linear
            maps.
        recurrent_bytes: that autograd stores of a token in it.
        recurrent_workspace: bytes of a token while the backward pass computes it, all heads at
            once.
        written: the hand-written function computes them (`layer.recognise`).
        norms_after: there are norms behind attention and the MLP.
        chosen: keys that an indexer chooses for a query; 0 without one. Attention is computed over
            all keys, with the others masked.
        scored: FLOP of an indexer for a query and a key.
        wide_router: the router computes with its input in fp32: where its weight is trained,
            autograd stores that copy.
        gates: numbers of one token's gate on attention's output, in the hand-written function.
        one_kernel_gate: routed experts are computed by `model.experts`, with a gate that stores its
            input alone.
        expert_biases: routed experts have biases.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mixer_parameters: int
    dense_parameters: int
    parameters: int
    hidden: int
    reach: int = 0
    within_chunk: bool = False
    expert_parameters: int = 0
    experts: int = 0
    used: int = 0
    norms: int = 2
    head_norms: bool = False
    softcap: bool = False
    recurrent_flop: float = 0.0
    recurrent_bytes: float = 0.0
    recurrent_workspace: float = 0.0
    written: bool = False
    norms_after: bool = False
    chosen: int = 0
    scored: float = 0.0
    wide_router: bool = False
    gates: int = 0
    one_kernel_gate: bool = False
    expert_biases: bool = False

    @property
    def active_expert_parameters(self) -> int:
        """Those that one token passes."""
        return self.expert_parameters * self.used // self.experts if self.experts else 0

    @property
    def mlp_parameters(self) -> int:
        """That one token passes."""
        return self.dense_parameters + self.active_expert_parameters

    @property
    def dense_width(self) -> int:
        """Numbers of one token between the maps of a gated MLP of as many parameters."""
        return self.dense_parameters // (3 * self.hidden)

    @property
    def expert_width(self) -> int:
        """As `dense_width`, of the experts that one token passes."""
        return self.active_expert_parameters // (3 * self.hidden)

    @property
    def shared_width(self) -> int:
        """As `dense_width`, of what stands beside routed experts and their router."""
        return max(0, self.dense_parameters - self.experts * self.hidden) // (3 * self.hidden)

    @property
    def queries(self) -> int:
        """Numbers of one token's queries."""
        return self.heads * self.head_dim

    @property
    def keys_values(self) -> int:
        """Numbers of one token's keys and values."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def outputs(self) -> int:
        """Numbers of one token's attention output."""
        return self.heads * self.value_dim

    def keys_seen(self, tokens: int) -> float:
        """Keys that a query of a causal row of `tokens` sees on average, as kernels compute it."""
        if not self.reach or self.reach >= tokens:
            return tokens / 2
        if self.within_chunk:
            return self.reach / 2
        seen = self.reach - self.reach**2 / (2 * tokens)
        return min(tokens / 2, seen + WINDOW_TILE)

    def attention_flop(self, tokens: int) -> float:
        """Of one token's softmax attention, forward, in a row of `tokens`."""
        return 2.0 * self.keys_seen(tokens) * self.heads * (self.head_dim + self.value_dim)

    def chooses(self, tokens: int) -> bool:
        """Whether an indexer leaves keys out of a document of `tokens`."""
        return bool(self.chosen) and tokens > self.chosen

    def needed_flop(self, tokens: int) -> float:
        """Of one token's softmax attention, forward: as `attention_flop`, but for keys that an
        indexer leaves out.
        """
        if not self.chooses(tokens):
            return self.attention_flop(tokens)
        keys = self.chosen - self.chosen**2 / (2 * tokens)
        return 2.0 * keys * self.heads * (self.head_dim + self.value_dim)

    def scoring_flop(self, tokens: int) -> float:
        """Of one token's query of an indexer: all keys of a document of `tokens`, in fp32."""
        return self.scored * tokens if self.chooses(tokens) else 0.0


def kinds_of(model: nn.Module, config: Any) -> tuple[LayerKind, ...]:
    """The kind of each decoder layer of a model, which may be without storage."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    _, layers = decoder_layers(model)
    return tuple(_kind(layer, text, index) for index, layer in enumerate(layers))


def _kind(layer: nn.Module, config: Any, index: int) -> LayerKind:
    own = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
    hidden = int(config.hidden_size)
    mixer = dense = routed = everything = experts = norms = 0
    head_norms = False
    for name, parameter in layer.named_parameters():
        size = parameter.numel()
        everything += size
        if parameter.dim() == 1:
            norms += parameter.shape[0] == hidden and "norm" in name and name.endswith("weight")
            head_norms |= bool(re.search(r"(q|query)\w*norm", name)) and "_a_" not in name
        elif _EXPERTS.search(name) and "shared" not in name:
            routed += size
            experts = max(experts, _experts_of(name, parameter, layer))
        elif parameter.dim() == 2 and _mixes(layer, name.split(".")[0]):
            mixer += size
        elif parameter.dim() == 2:
            dense += size
    heads, kv_heads, head_dim, value_dim = _heads(layer, own, index)
    reach, within_chunk = _reach(layer, own, index)
    recurrent = mixer_of(layer)
    parts = recognise(layer)
    shape = None if isinstance(parts, str) else parts.shape
    return LayerKind(
        heads,
        kv_heads,
        head_dim,
        value_dim,
        mixer,
        dense,
        everything,
        hidden,
        reach,
        within_chunk,
        routed,
        experts,
        _used(own, experts),
        max(norms, 1),
        head_norms,
        bool(getattr(own, "attn_logit_softcapping", None)),
        recurrent_flop(recurrent) if recurrent else 0.0,
        recurrent_bytes(recurrent) if recurrent else 0.0,
        recurrent_workspace(recurrent) if recurrent else 0.0,
        shape is not None,
        shape is not None and shape.norm("norm2_after") is not None,
        *_choice(layer),
        bool(experts) and _wide_router(layer),
        0 if isinstance(parts, str) else _gates(parts),
        gates_in_one_kernel(layer),
        have_biases(layer),
    )


def _wide_router(layer: nn.Module) -> bool:
    """Whether a router that holds its weight casts what it is given to fp32, by its code."""
    return any(
        any(p.dim() == 2 for p in router.parameters(recurse=False))
        and _IN_FLOAT32.search(_source(type(router))) is not None
        for router in routers(layer).values()
    )


def _source(kind: type[nn.Module]) -> str:
    """Of its forward; of code that stands in no file as if its router cast, which plans more."""
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return "hidden_states.float()"


def _gates(parts: LayerParts) -> int:
    """Numbers of one token's gate on attention's output: of its own linear, or of the queries'."""
    shape = parts.shape
    if shape.output_gate is None:
        return 0
    own = parts.linears.get("g")
    return shape.heads * shape.head_dim if own is None else int(own.out_features)


def _choice(layer: nn.Module) -> tuple[int, float]:
    """Keys that an indexer in the layer, or in an earlier one, chooses for a query; and its FLOP
    for a query and a key. 0 where every key is seen.
    """
    found: Any = next((m for m in layer.modules() if hasattr(m, "indexer")), None)
    indexer = getattr(found, "indexer", None)
    if indexer is None:
        # It may use the choice of an earlier layer.
        shared = getattr(found, "skip_topk", False)
        return (int(found.config.index_topk) if shared else 0), 0.0
    if hasattr(indexer, "block_size"):
        keys = indexer.topk_blocks * indexer.block_size
        return int(keys), 2.0 * indexer.num_heads * indexer.head_dim
    return int(indexer.index_topk), 2.0 * indexer.n_heads * (indexer.head_dim + 1)


def _experts_of(name: str, parameter: Any, layer: nn.Module) -> int:
    """How many experts there are, by a parameter of theirs: its first dimension, or the list that
    its module is in.
    """
    numbered = re.match(r"(.*experts)\.\d+\.", name)
    if numbered:
        return len(list(layer.get_submodule(numbered[1]).children()))
    return int(parameter.shape[0]) if parameter.dim() == 3 else 1


def _used(config: Any, experts: int) -> int:
    """Experts that compute a token: Llama 4's all do, and all but those chosen give zeros."""
    if str(getattr(config, "model_type", "")).startswith("llama4"):
        return experts
    return min(experts, used_experts(config) or 1) if experts else 0


def used_experts(config: Any) -> int:
    """Routed experts that a token passes, by a configuration's many names for it; 0 if it names
    none.
    """
    given = (getattr(config, name, None) for name in _USED)
    return next((int(value) for value in given if isinstance(value, int) and value > 0), 0)


def recurrent_bytes(mixer: Mixer) -> float:
    """That autograd stores of one token in a mixer but for its input, in half precision: fitted to
    counts of its stored tensors.
    """
    values = mixer.heads * mixer.value_dim
    plain = mixer.kind == "plain"
    # a scan's output is in fp32, and so is what a layer adds to it
    stored = 6.0 * mixer.channels + (26.0 if plain else 18.0) * values
    if mixer.gated_norm:
        # In one kernel, it stores its inputs alone (`norms`), and Mamba 2's scan adds what passes
        # it by.
        stored -= (15.0 if plain else 11.0) * values
    if mixer.per_channel:
        stored += 17.2 * mixer.heads * mixer.key_dim
    return stored + 18.0 * mixer.heads


def recurrent_workspace(mixer: Mixer) -> float:
    """Bytes of one token in the chunks of a recurrence, all heads at once, by the kernels."""
    if mixer.kind is None:
        return 0.0
    share = max(1, mixer.heads // mixer.key_heads)
    one = head_bytes(
        mixer.kind, mixer.key_dim, mixer.value_dim, mixer.per_channel, share, kernels=True
    )
    return mixer.heads * one


def recurrent_flop(mixer: Mixer) -> float:
    """Of one token in a mixer, forward: its convolution; in chunks of `CHUNK` tokens products of
    keys with queries, reading and writing the state; in a delta rule also products of keys with
    keys, the inverse of a triangular matrix, its products with keys and values, and what is read of
    the state to be taken out.
    """
    key, value = mixer.key_dim, mixer.value_dim
    scores = CHUNK * key
    products = 2.0 * key * value + CHUNK * value
    if mixer.kind == "delta":
        scores += CHUNK * key
        products += key * value + CHUNK * CHUNK / 3 + CHUNK * (key + value)
    recurrence = mixer.key_heads * scores + mixer.heads * products
    return 2.0 * (recurrence + mixer.channels * mixer.width)


def _type(config: Any, index: int) -> str:
    types = layer_types(config)
    return types[index] if index < len(types) else "full_attention"


def _mixes(layer: nn.Module, child: str) -> bool:
    """Whether a child of a layer mixes tokens, by its name. Blocks of one mixer each (Nemotron-H)
    call their MLPs mixers, too: those, by their class, do not.
    """
    kind = type(getattr(layer, child)).__name__
    return bool(_MIXERS.search(child)) and not re.search(r"MLP|MoE|MOE", kind)


def _attention(layer: nn.Module) -> nn.Module | None:
    found = [m for name, m in layer.named_children() if re.search(r"attn|attention", name)]
    found += [m for m in layer.children() if "Attention" in type(m).__name__]
    return found[0] if found else None


def _heads(layer: nn.Module, config: Any, index: int) -> tuple[int, int, int, int]:
    """Heads, key heads, and the dims of queries and of values."""
    if _type(config, index) in ("linear_attention", "conv", "mamba", "recurrent"):
        return 0, 0, 0, 0
    module = _attention(layer)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if module is None or not heads:
        return 0, 0, 0, 0
    plain = getattr(config, "qk_nope_head_dim", None)
    rotary = getattr(config, "qk_rope_head_dim", None)
    if plain is not None and rotary is not None:  # latent attention
        dim = int(plain) + int(rotary)
        return heads, heads, dim, int(getattr(config, "v_head_dim", None) or dim)
    dim = int(
        getattr(module, "head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // heads
    )
    keys = getattr(module, "k_proj", None)
    if isinstance(keys, nn.Linear):
        return heads, max(keys.out_features // dim, 1), dim, dim
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), dim, dim


def _reach(layer: nn.Module, config: Any, index: int) -> tuple[int, bool]:
    """Tokens of a sliding window or of a chunk, and whether it is a chunk. 0: all are seen."""
    kind = _type(config, index)
    if kind == "chunked_attention":
        return int(getattr(config, "attention_chunk_size", None) or 0), True
    module = _attention(layer)
    given = getattr(module, "sliding_window", None)
    if kind == "sliding_attention":
        given = given or getattr(config, "sliding_window", None)
    elif getattr(config, "layer_types", None):
        given = None
    elif given is None and getattr(config, "use_sliding_window", True) is not False:
        given = getattr(config, "sliding_window", None)
    return (int(given), False) if isinstance(given, int) and given > 0 else (0, False)


def plain_kinds(config: Any) -> tuple[LayerKind, ...]:
    """Of a configuration of Llama's shape, or of its experts, without a model."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = config.hidden_size
    dim = max(given or hidden // heads for given in values_of_layers(config, "head_dim"))
    ffn = max(given or 4 * hidden for given in values_of_layers(config, "intermediate_size"))
    mixer = hidden * dim * 2 * (heads + kv_heads)
    written = config.model_type.removesuffix("_text") in FAMILIES
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        dense = 3 * hidden * ffn
        kind = LayerKind(
            heads, kv_heads, dim, dim, mixer, dense, mixer + dense, hidden, written=written
        )
    else:
        ffn = max(given or ffn for given in values_of_layers(config, "moe_intermediate_size"))
        routed = 3 * experts * hidden * ffn
        kind = LayerKind(
            heads,
            kv_heads,
            dim,
            dim,
            mixer,
            0,
            mixer + routed,
            hidden,
            expert_parameters=routed,
            experts=experts,
            used=_used(config, experts),
            written=written,
        )
    return (kind,) * config.num_hidden_layers
