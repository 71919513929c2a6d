"""Hugging Face models under sequence parallelism: through transformers' own attention registry, by
name, without patching a module.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=hf.ATTENTION)
    hf.prepare(model, ctx)  # before FSDP2, DDP or ZeRO wrap it, before or after PEFT does
    ...wrap...
    hf.guard(wrapped, ctx)  # every rank
    logits = wrapped(**hf.inputs(row, plan)).logits

The plan travels with the call, as a keyword argument and on the `position_ids` tensor: a layer that
is computed again in the backward pass receives the plan of its own forward pass, whatever ran in
between.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from . import indexer, probe, rope, sparse
from .attention import attention as engine
from .backends import start
from .backends.request import Request
from .collectives import shard
from .context import SequenceParallel
from .hooks import ModelHooks
from .plan import RowPlan
from .recurrent import layers as recurrent

ATTENTION = "longfactory"
"""The registered name. Pass it as `attn_implementation`."""

# Arguments that models pass to their attention function and that change nothing here.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "layer_idx",
        "return_dict",
    }
)
_NOT_ROUTED = "its attention does not pass through transformers' attention registry"
DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


_hooks: weakref.WeakKeyDictionary[nn.Module, ModelHooks] = weakref.WeakKeyDictionary()
"""Of the models that were prepared."""


class _Absent(enum.Enum):
    ABSENT = enum.auto()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | indexer.RowMask | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | _Absent | None = _Absent.ABSENT,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sp_plan: RowPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query [1, H, T/n, D], key and value [1, Hkv,
    T/n, D] -> ([1, T/n, H, Dv], None).

    Raises:
        ValueError: the call asks for something that the engine does not compute, or was not given a
            plan.
    """
    name = type(module).__name__
    plan = sp_plan if sp_plan is not None else _carried(module, kwargs)
    if plan is None:
        raise ValueError(
            f"{name}: no sp_plan reached the attention function. Call the model with hf.inputs(row,"
            " plan)."
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"{name}: a batch of {query.shape[0]} rows; the engine takes one flat row. Lay the"
            " samples end to end in it."
        )
    local = plan.local_length
    if query.shape[2] != local or key.shape[2] != local:
        raise ValueError(
            f"{name}: {query.shape[2]} queries and {key.shape[2]} keys, the plan has {local} tokens"
            " on this rank. Cross-attention, caches and prefix tokens are not supported; call the"
            " model with hf.inputs(row, plan)."
        )
    if attention_mask is not None and attention_mask is not indexer.MASK:
        raise ValueError(
            f"{name}: an attention mask would be lost: the plan's documents are the mask."
        )
    if dropout and module.training:
        raise ValueError(
            f"{name}: dropout of attention weights ({dropout}) is not computed. Set"
            " attention_dropout: 0 in the model's config."
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{name}: attention to later tokens (is_causal=False) is not supported.")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ValueError(
            f"{name}: a cache of keys and values is not supported. Call the model with"
            " use_cache=False."
        )
    chosen = indexer.chosen(module, kwargs)
    for argument, given in kwargs.items():
        if argument not in _WITHOUT_EFFECT and given is not None and given is not False:
            raise ValueError(
                f"{name}: the argument {argument} of its attention is not implemented under"
                " sequence parallelism."
            )
    window = _window(module) if sliding_window is _Absent.ABSENT else sliding_window
    chunk = _chunk(module)
    if (seen := probe.current()) is not None:
        seen.calls += 1
        seen.modules.add(id(module))
        seen.heads.add((query.shape[1], key.shape[1]))
        seen.asked[seen.layer].add(
            probe.settings(
                query.shape[3] ** -0.5 if scaling is None else scaling,
                window,
                chunk,
                softcap,
                s_aux,
            )
        )
        if window:
            seen.windows.add(window)
    if (scales := _temperature(module, plan, query.device)) is not None:
        query = (query * scales[:, None]).to(query.dtype)
    # [1, H, T/n, D] -> [T/n, H, D]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if chosen is not None:
        if window or chunk or softcap:
            raise ValueError(
                f"{name}: chosen keys with a sliding window ({window}), attention chunks ({chunk})"
                f" or a soft-cap ({softcap}) are not implemented."
            )
        scale = q.shape[2] ** -0.5 if scaling is None else scaling
        return sparse.attention(q, k, v, plan, chosen, scale=scale, sinks=s_aux)[None], None
    # Kernels give their output in the layout of the queries. Of partly turned ones (`cat` of two
    # parts of all heads) it would be copied for the output projection, and be stored twice.
    out = engine(
        q.contiguous(),
        k,
        v,
        plan,
        scale=scaling,
        window=window or None,
        chunk=chunk,
        softcap=softcap or None,
        sinks=s_aux,
    )
    # part of a wider tensor where kernels pad heads, which a model may not take (AFMoE's `view`)
    return out[None].contiguous(), None


def _carried(module: nn.Module, kwargs: Mapping[str, Any]) -> RowPlan | None:
    """For models that keep only the arguments they know: `position_ids` is one of them, and carries
    the plan.
    """
    return getattr(kwargs.get("position_ids"), "sp_plan", None)


def _layer_type(module: nn.Module) -> str | None:
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    return types[layer] if types is not None and layer is not None and layer < len(types) else None


def _window(module: nn.Module) -> int | None:
    """Of models that give their window to the mask alone, which is not built here: Qwen2-MoE by
    layer type, PhiMoE for all layers.
    """
    config = getattr(module, "config", None)
    if (
        _layer_type(module) == "sliding_attention"
        or getattr(config, "model_type", None) == "phimoe"
    ):
        return getattr(config, "sliding_window", None)
    return None


def _chunk(module: nn.Module) -> int | None:
    """Llama 4: no argument of the attention function says that a layer attends inside chunks
    only.
    """
    return (
        module.config.attention_chunk_size if _layer_type(module) == "chunked_attention" else None
    )


def mask(
    *args: Any,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> None:
    """The mask function that transformers calls. Builds nothing; refuses a mask that the plan does
    not say.

    transformers reads documents from jumps of `position_ids`. A shard's position ids jump between
    chunks too, so what it reads is wrong and is ignored: the plan knows the documents.
    """
    model = getattr(config, "model_type", "the model")
    # Models of the BART family make a mask of ones themselves. Reading it waits for the device;
    # others pass none.
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"{model}: a padding mask would be lost under sequence parallelism. Padding is a"
            " document of the row; pass attention_mask=None."
        )
    found: set[tuple[str, int]] = set()
    if mask_function is None or (reason := _lost(mask_function, found)):
        raise ValueError(
            f"{model}: its mask is not causal attention inside documents"
            f" ({reason if mask_function else 'no mask function'})."
        )
    if (seen := probe.current()) is not None:
        seen.masks |= found


def _lost(function: Callable, found: set[tuple[str, int]]) -> str | None:
    """Why a mask function of transformers.masking_utils cannot be replaced by the plan, or None.
    Adds windows and chunks to `found`.
    """
    maker = function.__qualname__.split(".")[0]
    if function.__module__ != "transformers.masking_utils":
        return f"a mask function of its own, {function.__module__}.{function.__qualname__}"
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells}
    match maker:
        case "causal_mask_function" | "packed_sequence_mask_function":
            return None
        case "sliding_window_overlay":
            found.add(("window", held["sliding_window"]))
            return None
        case "chunked_overlay":
            found.add(("chunk", held["chunk_size"]))
            return None
        case "and_masks":
            return next(
                (reason for f in held["mask_functions"] if (reason := _lost(f, found))), None
            )
        case "remap_positions_for_packed_sequence":
            return _lost(held["mask_function"], found)
    names = {
        "bidirectional_mask_function": "bidirectional attention",
        "or_masks": "blocks of tokens that see each other",
    }
    return names.get(maker, maker)


def _documents(find: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    """transformers' search for documents in position ids, which waits for the device in each
    forward pass, without it where the plan knows them (`inputs`): of models with positions of
    images, which take those of text out of four, by the tensor that they are a view of.
    """

    @functools.wraps(find)
    def found(position_ids: Tensor) -> Tensor | None:
        known = any(hasattr(t, "sp_plan") for t in (position_ids, position_ids._base))
        return None if known else find(position_ids)

    return found


def _check_search(find: Callable) -> None:
    """Raises RuntimeError where transformers' function is not what is expected here."""
    names = list(inspect.signature(find).parameters)
    if names != ["position_ids"]:
        raise RuntimeError(
            "transformers.masking_utils.find_packed_sequence_indices takes"
            f" {', '.join(names) or 'nothing'}; LongFactory replaces a function of position_ids."
            " Install a version of transformers that this version of LongFactory supports."
        )


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, mask)
_check_search(masking_utils.find_packed_sequence_indices)
masking_utils.find_packed_sequence_indices = _documents(masking_utils.find_packed_sequence_indices)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, DeepSpeed, PEFT or nothing.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model.")


def inputs(row: Mapping[str, Tensor], plan: RowPlan) -> dict[str, Any]:
    """Keyword arguments for the model: this rank's tokens of a row with `input_ids` [T] and
    `position_ids` [T].

    Tokens may be distributed in any order, since each keeps its position. Logits are returned as
    [1, T/n, V] in the order of `plan.index`. Multi-dimensional positions (images) are [4, T], with
    those of text first.
    """
    ids = shard(row["input_ids"], plan)[None]
    positions = row["position_ids"]
    if positions.dim() == 1:
        positions = shard(positions, plan)[None]
    else:  # [4, T] -> [4, 1, T/n]
        positions = shard(positions.t(), plan).t()[:, None]
    # No view: a model's view of it is known as that by it, and nothing else is.
    positions = positions.clone(memory_format=torch.contiguous_format)
    positions.sp_plan = plan  # type: ignore[attr-defined]
    return {"input_ids": ids, "position_ids": positions, "sp_plan": plan, "use_cache": False}


def of_text(config: PreTrainedConfig, attention: str = ATTENTION) -> dict[str, Any]:
    """What `attn_implementation` must be for the text decoder alone to get an attention by name;
    towers keep their own.

    Some towers (that of SAM) are made for transformers' own names only.

    Args:
        config: of the whole model. Parts of parts are found too.
    """
    text = config.get_text_config()
    parts: dict[str, Any] = {"": attention}
    if config is text:
        return parts
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig) and _holds(part, text):
            # A name where one is enough: older transformers read one level of names only.
            parts[key] = (
                attention if part is text and not part.sub_configs else of_text(part, attention)
            )
    return parts


def _holds(config: PreTrainedConfig, part: PreTrainedConfig) -> bool:
    """Whether a configuration is another one or has it among its parts."""
    inner = [getattr(config, key, None) for key in config.sub_configs]
    return config is part or any(isinstance(c, PreTrainedConfig) and _holds(c, part) for c in inner)


def prepare(model: PreTrainedModel, ctx: SequenceParallel) -> None:
    """Routes the model's attention through the engine. Once, before it is wrapped; needed at every
    size, 1 too.

    Sets the attention implementation, and hooks what depends on the length of the row: rotary
    embeddings with longrope or dynamic frequencies, the temperature of Llama 4, recurrent and
    convolutional layers, and indexers.

    Raises:
        ValueError: the model has layers that the engine cannot compute exactly, or its attention is
            not reached by the registry. Names the model type and what to do.
    """
    inner = unwrap(model)
    check(inner)
    config = inner.config.get_text_config()
    inner.set_attn_implementation(of_text(inner.config))
    if config._attn_implementation != ATTENTION:
        raise ValueError(
            f"Models of type {config.model_type} cannot be trained here: {_NOT_ROUTED}."
        )
    hooks = _hooks.setdefault(inner, ModelHooks())
    for module in inner.modules():
        if isinstance(module, PreTrainedModel):
            hooks.before(module, _attach)
        if _tunes_by_index(module):
            hooks.before(module, _tuning_off)
            hooks.after(module, _tuning_on, always=True)
    rope.prepare(inner, hooks)
    recurrent.prepare(inner, ctx, hooks)
    indexer.prepare(inner, hooks)
    layers = layer_configs(config)
    heads = [n for layer in layers if (n := getattr(layer, "num_attention_heads", None))]
    keys = [n for layer in layers if (n := getattr(layer, "num_key_value_heads", None))]
    if ctx.heads is None and heads:
        ctx.set_heads(math.gcd(*heads), math.gcd(*keys) if keys else None)


def release(model: nn.Module) -> None:
    """Takes off what `prepare` has put on a model: it computes as transformers' own again, once it
    is given an attention of transformers' (`set_attn_implementation`).
    """
    if (hooks := _hooks.pop(unwrap(model), None)) is not None:
        hooks.remove()


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes its attention itself."""
    held: list[Any] = [m.config for m in model.modules() if getattr(m, "config", None) is not None]
    configs = {id(c): c for c in held if getattr(c, "_attn_implementation", None) == ATTENTION}
    try:
        for c in configs.values():
            c._attn_implementation_internal = "eager"
        yield
    finally:
        for c in configs.values():
            c._attn_implementation_internal = ATTENTION


def check(model: PreTrainedModel) -> None:
    """What `prepare` refuses whatever the size. Reads no weight: the model may be on the meta
    device.

    Raises:
        ValueError: see `prepare`.
    """
    config = model.config.get_text_config()
    reason = unsupported(model.config)
    if reason is None and not model._can_set_attn_implementation():
        reason = _NOT_ROUTED
    if reason:
        raise ValueError(f"Models of type {config.model_type} cannot be trained here: {reason}.")
    for key in DROPOUT_KEYS:
        if getattr(config, key, None):
            raise ValueError(
                f"{config.model_type}: dropout of attention weights is not computed, and {key} is"
                f" {getattr(config, key)}. Load the model with {key}=0 (in a run's file:"
                " attention_dropout: 0)."
            )


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why no model of this configuration can be computed, as far as the configuration tells, or
    None.
    """
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False:
        return "its attention sees later tokens (is_causal is false)"
    return recurrent.unsupported(text)


def layer_types(config: Any) -> list[str]:
    """The kind of each layer, "full_attention" where the configuration does not say."""
    given = getattr(config, "layer_types", None)
    return list(given) if given else ["full_attention"] * config.num_hidden_layers


def layer_configs(config: Any) -> list[Any]:
    """The configurations of the layers, where they differ; else the one that all have."""
    return config.per_layer_config[:] if getattr(config, "is_heterogeneous", False) else [config]


def values_of_layers(config: Any, key: str) -> list[Any]:
    """The different values that a key has in the layers.

    Layers of Gemma 4 differ, and its configuration names no value for all; Gemma 3n has a list of
    values.
    """
    given = [getattr(layer, key, None) for layer in layer_configs(config)]
    values = [
        v for entry in given for v in (entry if isinstance(entry, (list, tuple)) else [entry])
    ]
    return list(dict.fromkeys(values))


def head_dims(config: PreTrainedConfig) -> set[tuple[int, int]]:
    """Head dims of queries and of values of the model's layers, as far as the configuration
    tells.
    """
    text = config.get_text_config()
    return set().union(*(_head_dims(layer) for layer in layer_configs(text)))


def _head_dims(text: Any) -> set[tuple[int, int]]:
    """Of layers of one configuration."""
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    dims: set[tuple[int, int]] = set()
    usual = hidden // heads if hidden and heads else None
    for dim in (
        *(given or usual for given in values_of_layers(text, "head_dim")),
        getattr(text, "global_head_dim", None),
    ):
        if isinstance(dim, int) and dim > 0:
            dims.add((dim, dim))
    plain, rotary = getattr(text, "qk_nope_head_dim", None), getattr(text, "qk_rope_head_dim", None)
    if plain is not None and rotary is not None:  # multi-head latent attention
        dims = {(plain + rotary, getattr(text, "v_head_dim", None) or plain + rotary)}
    return dims


def kernel_requests(
    config: PreTrainedConfig, ctx: SequenceParallel, dtype: torch.dtype
) -> list[Request]:
    """The kinds of tiles that a model of this configuration will ask kernels for, as far as the
    configuration tells.

    Args:
        dtype: in which attention is computed.
    """
    text = config.get_text_config()
    windowed = any(values_of_layers(text, "sliding_window"))
    types = getattr(text, "layer_types", None)
    used = getattr(text, "use_sliding_window", True)
    windows = windowed and used and (types is None or "sliding_attention" in types)
    softcap = has_softcap(text)
    group = max(_group(layer) for layer in layer_configs(text))
    return start.requests_of(
        ctx.device_type, dtype, head_dims(config), windows=windows, softcap=softcap, group=group
    )


def has_softcap(text: Any) -> bool:
    """Whether attention scores of a text decoder have a soft-cap. PyTorch's attention has none, and
    transformers before 5.21 takes it for such decoders all the same.
    """
    return bool(getattr(text, "attn_logit_softcapping", None))


def _group(config: Any) -> int:
    """Query heads of a key head, as far as the configuration tells."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads >= kv_heads:
        return heads // kv_heads
    return 1


def _attach(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """A wrapper that moved the inputs to its device has lost what was on them."""
    positions, plan = kwargs.get("position_ids"), kwargs.get("sp_plan")
    if isinstance(positions, Tensor) and plan is not None:
        positions.sp_plan = plan  # type: ignore[attr-defined]


def _tunes_by_index(module: nn.Module) -> bool:
    """Whether this is an attention layer of Llama 4's, with the temperature on. Asked of the
    configuration: the layer's own flag is off while it runs.
    """
    config = getattr(module, "config", None)
    return hasattr(module, "floor_scale") and bool(
        getattr(config, "attn_temperature_tuning", False)
    )


def _tuning_off(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Llama 4 scales queries by their index in the tensor, which in a shard is not their position:
    `attention` does it instead.
    """
    if kwargs.get("sp_plan") is not None:
        module.attn_temperature_tuning = False  # type: ignore[assignment]


def _tuning_on(module: nn.Module, args: Any, output: Any) -> None:
    module.attn_temperature_tuning = True  # type: ignore[assignment]


def _temperature(module: nn.Module, plan: RowPlan, device: torch.device) -> Tensor | None:
    """[T/n] factors of the queries, from positions in the document; None where the layer has
    none.
    """
    if not _tunes_by_index(module) or module.use_rope:
        return None
    steps = torch.floor((rope.positions(plan, device).float() + 1.0) / module.floor_scale)
    return torch.log1p(steps) * module.attn_scale + 1.0
