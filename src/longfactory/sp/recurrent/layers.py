"""Recurrent and convolutional layers of transformers' models, under sequence parallelism.

Such a layer (a mixer) is transformers' own code around one or two functions of its module: a short
convolution, and a recurrence. Its own forward runs with those functions exchanged for the engine's,
which know documents and ranks. So projections, gates, norms and whatever differs between families
stay transformers', and what a version of transformers computes is what is trained.

    causal_conv1d_fn                 convolution.py
    torch_chunk_gated_delta_rule     chunked.py, gated delta net: Qwen3-Next, Qwen3.5, OLMo hybrid
    chunk_kimi_delta_attention       chunked.py, a decay of each channel: Kimi Linear
    mamba2_chunk_scan                chunked.py, Mamba 2: Nemotron-H, Granite 4, Falcon-H1, Bamba
    mamba_selective_scan             chunked.py, Mamba: Zamba

Two classes call none: MiniMax's lightning attention is written here, and RecurrentGemma's recurrent
block runs on a stand-in, whose convolution and scan are the engine's.

The decoder layers of Jamba, Mamba, Mamba 2, Falcon Mamba and (under transformers 5.17) LFM2 are not
given all arguments of the model's call, or do not give them to their mixers: a hook hands the plan
to each of these layers, and its mixer knows it while the layer's forward runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib.util
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import indexer, probe
from ..context import SequenceParallel
from ..hooks import ModelHooks
from ..plan import RowPlan
from .exchange import over_ranks
from .functions import FUNCTIONS, NAMES, convolved
from .rule import Kind, Rule, wide

log = logging.getLogger(__name__)

LAYERS = frozenset({"linear_attention", "conv", "hybrid"})
"""Layer types that are computed here, in the models below."""

MODELS = frozenset(
    {
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "olmo_hybrid",
        "kimi_linear",
        "nemotron_h",
        "granitemoehybrid",
        "falcon_h1",
        "bamba",
        "zamba2",
        "mamba2",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "minimax",
        "jamba",
        "mamba",
        "falcon_mamba",
        "zamba",
        "bailing_hybrid",
        "recurrent_gemma",
    }
)
"""Text models whose mixers are made of the functions above."""

NOT_REACHED = (
    "the plan of the row does not reach its recurrent layers: the model does not pass the"
    " arguments of its call on to them"
)
_CARRIED = frozenset({"jamba", "mamba", "mamba2", "falcon_mamba"})
"""Of these, models on the way to whose mixers arguments of the call are lost."""
_CARRIED_IN_5_17 = frozenset({"lfm2", "lfm2_moe"})
"""The same where their layers hand on `kwargs.get("seq_idx")`, and not all arguments."""

_KNOWN = frozenset(
    {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "sparse",
        "dense",
        "moe",
        "mlp",
    }
)
_STATE = (
    "its recurrent layers carry a state along the document, from one rank's tokens to another's, by"
    " code of their own that is not implemented (known: gated delta nets, Kimi delta attention,"
    " Mamba, Mamba 2, lightning attention, short convolutions)"
)
_INDEXER = (
    "its sparse attention chooses keys by an indexer of its own that is not implemented (known: one"
    " key a token, as in DeepSeek-V3.2, and blocks of keys, as in MiniMax-M3)"
)
_COMPRESSED = "its attention reads a compressed copy of the keys of the whole row"
_OF_MODELS = {
    "qwen4_exp_text": (
        "its indexer scores means of several keys, one query after another, by the mask of the"
        " whole row, and its n-gram embeddings read earlier tokens; an indexer of one key a token"
        " and one of blocks of keys are implemented"
    ),
    "glm5_next_text": (
        "its indexer scores pools of several keys and gives queries the tokens of a pool that is"
        " not full yet; an indexer of one key a token and one of blocks of keys are implemented"
    ),
    "deepseek_v4": (
        "its attention reads, beside a window, one compressed key for each group of tokens of the"
        " whole row, with a softmax over both; attention of a sharded row over two kinds of keys is"
        " not implemented"
    ),
}
"""Why a model's own kinds of layers are not computed, where its code is known."""
_REASONS = {
    "linear_attention": _STATE,
    "hybrid": _STATE,
    "hybrid_sliding": _STATE,
    "conv": "its short convolutions read tokens of another rank at the ends of a shard",
    "indexed_attention": _INDEXER,
    "deepseek_sparse_attention": _INDEXER,  # older names of it
    "qwen_sparse_attention": _INDEXER,
    "minimax_m3_sparse": _INDEXER,
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
}


def unsupported(config: Any) -> str | None:
    """Why layers of this configuration cannot be computed, or None."""
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    for kind in sorted(kinds, key=lambda kind: kind in LAYERS):
        if kind in LAYERS and config.model_type in MODELS:
            continue
        if kind in indexer.LAYERS and config.model_type in indexer.MODELS:
            continue
        if kind in LAYERS or kind not in _KNOWN:
            if config.model_type in _OF_MODELS:
                return _OF_MODELS[config.model_type]
            return _REASONS.get(kind, f"layers of type {kind} are unknown to the engine")
    return None


def mixers(model: nn.Module) -> list[nn.Module]:
    """The recurrent and convolutional layers of a model."""
    return [m for m in model.modules() if _exchanged(type(m))]


def prepare(model: nn.Module, ctx: SequenceParallel, hooks: ModelHooks) -> None:
    """Gives every mixer its forward over the ranks, and says by what it will be computed."""
    found = mixers(model)
    for module in found:
        hooks.replace_forward(module, _WRITTEN.get(type(module).__name__, _forward))
    if _loses_the_plan(model):
        hooks.before(model, _hold)
        for block in _blocks(model):
            hooks.before(block, _hand_over)
            hooks.replace_forward(block, _with_plan)
    if found and ctx.rank == 0 and ctx.dp_rank == 0:
        log.info(
            "%d recurrent layers (%s) are computed by %s.",
            len(found),
            ", ".join(names(model)),
            _computed_by(ctx.device_type),
        )


def _computed_by(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None or device_type != "cuda":
        return "PyTorch" + (", slowly: Triton is not installed" if device_type == "cuda" else "")
    return "Triton kernels of LongFactory; flash-linear-attention and mamba-ssm are not used"


# ---- models that lose the plan on its way


_held: weakref.WeakKeyDictionary[nn.Module, RowPlan] = weakref.WeakKeyDictionary()
"""The plan of the model's call, of each decoder layer with a mixer."""
_current: contextvars.ContextVar[RowPlan | None] = contextvars.ContextVar("plan", default=None)
"""Of the decoder layer whose forward runs."""


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Modules that hold a mixer as their own child."""
    return [m for m in model.modules() if any(_exchanged(type(child)) for child in m.children())]


def _loses_the_plan(model: nn.Module) -> bool:
    kind = getattr(model.config, "model_type", None)
    if kind in _CARRIED_IN_5_17:
        forwards = {_own_forward(type(block)) for block in _blocks(model)}
        return any("seq_idx" in forward.__code__.co_consts for forward in forwards)
    return kind in _CARRIED


def _hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before the model's forward."""
    for block in _blocks(module):
        _held.pop(block, None)
        if kwargs.get("sp_plan") is not None:
            _held[block] = kwargs["sp_plan"]


def _hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a decoder layer's forward: it gets the plan as an argument, which layers that are
    computed again store with the others.
    """
    plan = _held.get(module)
    if kwargs.get("sp_plan") is not None or plan is None:
        return None
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{type(module).__name__}: transformers' gradient checkpointing computes this layer"
            " again without its arguments. Let LongFactory's memory keys recompute it:"
            " gradient_checkpointing_disable() on the model."
        )
    return args, {**kwargs, "sp_plan": plan}


def _with_plan(self: Any, *args: Any, sp_plan: RowPlan | None = None, **kwargs: Any) -> Any:
    """Replaces the forward of such a decoder layer on the instance."""
    token = _current.set(sp_plan)
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        _current.reset(token)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a mixer on the instance. Without a plan: that of its class."""
    plan: RowPlan | None = kwargs.get("sp_plan", _current.get())
    if plan is None and _no_packages.get():
        return _reference_forward(self, hidden_states, *args, **kwargs)
    if plan is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    _check(self, plan, hidden_states, args, kwargs)
    own = _own_forward(type(self))
    engine = {name: _bound(make, plan) for name, make in FUNCTIONS.items()}
    if set(own.__code__.co_names) >= {"num_k_heads", "num_v_heads", "repeat_interleave"}:
        # transformers 5.17 repeats queries and keys for all heads that share them, and reads
        # num_k_heads for nothing else here; the recurrence takes them as they are.
        self = _StandIn(self, num_k_heads=self.num_v_heads)
    return _exchanged_in(own, engine)(self, hidden_states, **kwargs)


def _lightning(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of MiniMax's lightning attention, which calls no function."""
    plan: RowPlan | None = kwargs.get("sp_plan")
    if plan is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    _check(self, plan, hidden_states, args, kwargs)
    x = hidden_states[0]
    qkv = self.act_fn(self.qkv_proj(x)).unflatten(-1, (self.num_attention_heads, -1))
    q, k, v = qkv.split(self.head_dim, dim=-1)
    g = -self.slope_rate.to(wide(x)).flatten().expand(len(x), -1)
    out = over_ranks(q, k, v, g, torch.ones_like(g), Rule("plain", 1.0), plan, x.dtype)
    out = self.norm(out.flatten(1)) * self.output_gate(x).sigmoid()
    return self.out_proj(out)[None], None


class _StandIn:
    """A module with some of its parts exchanged, for the module's own code."""

    def __init__(self, module: nn.Module, **parts: Any) -> None:
        self.__dict__.update(parts, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)  # type: ignore[arg-type]


def _griffin(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of RecurrentGemma's recurrent block."""
    plan: RowPlan | None = kwargs.get("sp_plan")
    if plan is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    _check(self, plan, hidden_states, args, kwargs)
    weights = self.conv_1d

    def of_row(x: Tensor) -> Tensor:
        return convolved(plan, x, weights.weight[:, 0], weights.bias)

    def scanned(hidden_states: Tensor, recurrent_gate: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[1, T/n, W] each -> [1, T/n, W]: every channel is a state of one number. Where a document
        begins there is none, whatever the gate.
        """
        g = recurrent_gate[0].to(wide(hidden_states)).log()
        v = hidden_states[0][..., None]
        one = v.new_ones(len(v), 1, 1)
        rule = Rule("plain", 1.0)
        out = over_ranks(one, one, v, g, torch.ones_like(g), rule, plan, hidden_states.dtype)
        return out[None, ..., 0], None

    unit = _StandIn(self.rg_lru, _rnn_scan=scanned)
    block = _StandIn(self, conv_1d=of_row, rg_lru=unit)
    return block(hidden_states, **{**kwargs, "use_cache": False, "attention_mask": None})


_WRITTEN: dict[str, Callable[..., Any]] = {
    "MiniMaxLightningAttention": _lightning,
    "RecurrentGemmaRecurrentBlock": _griffin,
}
"""Classes whose recurrence stands in their own code, and what runs in place of their forward."""
_WRITTEN_NAMES = {
    "MiniMaxLightningAttention": "lightning attention",
    "RecurrentGemmaRecurrentBlock": "gated linear recurrent unit",
}


def _check(
    self: Any, plan: RowPlan, hidden_states: Tensor, args: Any, kwargs: dict[str, Any]
) -> None:
    """Refuses what would be lost, and tells the guard that this mixer is reached."""
    caches = ("attention_mask", "cache_params", "past_key_values")
    if args or any(kwargs.get(name) is not None for name in caches):
        raise ValueError(
            f"{type(self).__name__}: masks and caches are not supported. Call the model with"
            " hf.inputs(row, plan)."
        )
    if hidden_states.shape[0] != 1 or hidden_states.shape[1] != plan.local_length:
        raise ValueError(
            f"{type(self).__name__}: hidden states {tuple(hidden_states.shape)}, expected one row"
            f" of this rank's {plan.local_length} tokens. Call the model with hf.inputs(row, plan)."
        )
    if (seen := probe.current()) is not None:
        seen.linear.add(id(self))


def _own_forward(kind: type[nn.Module]) -> types.FunctionType:
    """The forward of a class as it is written, without what decorates it."""
    forward = inspect.unwrap(kind.forward)
    assert isinstance(forward, types.FunctionType)
    return forward


def _exchanged_in(own: types.FunctionType, functions: dict[str, Any]) -> types.FunctionType:
    """A copy of a function for which these names mean others."""
    made = types.FunctionType(
        own.__code__,
        {**own.__globals__, **functions},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    made.__kwdefaults__ = own.__kwdefaults__
    return made


def _exchanged(kind: type[nn.Module]) -> bool:
    """Whether a class is a mixer: it calls a function that is exchanged, or is written here."""
    if kind.__name__ in _WRITTEN:
        return True
    forward = inspect.unwrap(kind.forward)
    return isinstance(forward, types.FunctionType) and any(
        name in FUNCTIONS and name in forward.__globals__ for name in forward.__code__.co_names
    )


def _bound(function: Callable[..., Any], plan: RowPlan) -> Callable[..., Any]:
    def bound(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("sp_plan", None)
        return function(plan, *args, **kwargs)

    return bound


class _Widened(TorchFunctionMode):
    """What is cast to float32 is cast to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def as_reference(model: nn.Module) -> None:
    """Lets mixers compute by transformers' own PyTorch functions, and those in float64 in float64
    all through: packages that are installed (flash-linear-attention, mamba-ssm, causal-conv1d) take
    their place in transformers, and are no reference; and transformers' functions are in float32
    whatever the model's type, so that what they round grows along a document. Only for models that
    `prepare` does not touch.
    """
    for module in model.modules():
        if _exchanged(type(module)):
            module.forward = types.MethodType(_reference_forward, module)


_no_packages: contextvars.ContextVar[bool] = contextvars.ContextVar("no packages", default=False)


@contextlib.contextmanager
def without_packages() -> Iterator[None]:
    """Mixers that are called without a plan compute as `as_reference` has it, and transformers does
    not say that they run slowly: none of it is training.
    """
    token = _no_packages.set(True)
    try:
        yield
    finally:
        _no_packages.reset(token)


def _reference_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    own = _own_forward(type(self))
    names = [name for name in own.__code__.co_names if name in FUNCTIONS]
    plain = {name: inspect.unwrap(own.__globals__[name]) for name in names}
    widened = next(self.parameters()).dtype == torch.float64
    with _Widened() if widened else contextlib.nullcontext():
        return _exchanged_in(own, plain)(self, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Mixer:
    """The sizes of a mixer.

    Attributes:
        kind: of its recurrence; None for a convolution alone.
        key_heads, heads, key_dim, value_dim: of the recurrence.
        per_channel: each key channel has a decay of its own.
        channels, width: of the convolution.
        gated_norm: its output goes through a norm with a gate.
    """

    kind: Kind | None
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    per_channel: bool
    channels: int
    width: int
    gated_norm: bool = False


def mixer_of(layer: nn.Module) -> Mixer | None:
    """The mixer in a decoder layer, which may be without storage; None where there is none."""
    for module in layer.modules():
        if not _exchanged(type(module)):
            continue
        m: Any = module
        if _WRITTEN.get(type(m).__name__) is _lightning:
            heads = m.num_attention_heads
            return Mixer("plain", heads, heads, m.head_dim, m.head_dim, False, 0, 0)
        convolution = next(c for c in m.children() if isinstance(c, nn.Conv1d))
        sizes = convolution.in_channels, convolution.kernel_size[0]
        if _WRITTEN.get(type(m).__name__) is _griffin:
            return Mixer("plain", 1, m.lru_width, 1, 1, False, *sizes)
        used = _own_forward(type(module)).__code__.co_names
        gated = any("RMSNormGated" in type(child).__name__ for child in m.children())
        if "torch_chunk_gated_delta_rule" in used:
            dims = m.num_k_heads, m.num_v_heads, m.head_k_dim, m.head_v_dim
            return Mixer("delta", *dims, False, *sizes, gated)
        if "chunk_kimi_delta_attention" in used:
            dims = m.num_heads, m.num_heads, m.head_dim, m.head_dim
            return Mixer("delta", *dims, True, *sizes, gated)
        if "mamba2_chunk_scan" in used:
            dims = m.n_groups, m.num_heads, m.ssm_state_size, m.head_dim
            return Mixer("plain", *dims, False, *sizes, gated)
        if "mamba_selective_scan" in used:
            return Mixer("plain", 1, m.intermediate_size, m.ssm_state_size, 1, True, *sizes)
        return Mixer(None, 0, 0, 0, 0, False, *sizes)
    return None


def names(model: nn.Module) -> list[str]:
    """What the recurrent layers of a model are called."""
    found: dict[str, None] = {}
    for kind in {type(m) for m in model.modules() if _exchanged(type(m))}:
        if kind.__name__ in _WRITTEN:
            found[_WRITTEN_NAMES[kind.__name__]] = None
            continue
        used = [NAMES[n] for n in _own_forward(kind).__code__.co_names if n in NAMES]
        found |= dict.fromkeys(used or ["short convolution"])
    return sorted(found)
