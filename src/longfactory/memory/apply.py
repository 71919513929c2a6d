"""Puts the memory engine into a model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from longfactory.errors import ConfigError
from longfactory.memory import chunked, norms
from longfactory.memory.checkpointed import CheckpointedLayer
from longfactory.memory.decoder_layer import Chain, DecoderLayer
from longfactory.memory.layer.recognise import recognise
from longfactory.memory.offload import Activations
from longfactory.memory.settings import MemorySettings
from longfactory.sp.hf import layer_configs, values_of_layers
from longfactory.sp.recurrent.layers import mixers
from longfactory.sp.text_model import decoder_layers

log = logging.getLogger(__name__)


def apply_memory(
    model: nn.Module,
    settings: MemorySettings,
    device: torch.device | str | None = None,
    longest: int = 0,
) -> Activations:
    """Installs activation checkpointing, saved attention outputs, offloading and chunking on every
    decoder layer. Call it once per model.

    Call it after PEFT has added its adapters, after `sp.hf.prepare`, and before DeepSpeed wraps the
    model; FSDP2 and DDP may wrap it before or after (the `forward` of instances is replaced, inside
    their hooks). Leave transformers' own gradient checkpointing off.

    Args:
        device: device that the model computes on; by default that of its parameters.
        longest: this rank's number of tokens of the longest row, for which host memory is pinned
            when the first row arrives; 0 if unknown.

    Raises:
        ConfigError: settings that this model does not support; says which, and what to change.
    """
    _, layers = decoder_layers(model)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    share = _attention_share(getattr(model, "config", None), next(model.parameters()).dtype)
    store = Activations(settings, len(layers), device, share, longest)
    if mixers(model):
        norms.install(model)
    if settings.checkpoint == "none":
        return store
    config: Any = getattr(model, "config", None)

    def chunk() -> int | None:
        return chunked.chunk_length(store.settings)

    moe = not getattr(config, "output_router_logits", False)
    chain, reasons = Chain(), set()
    for index, layer in enumerate(layers):
        if isinstance(layer.forward, CheckpointedLayer):
            raise ConfigError("The memory engine is already in this model. Call apply_memory once.")
        checkpointed = CheckpointedLayer(layer, index, store)
        if settings.layer == "auto":
            parts = recognise(layer)
            if not isinstance(parts, str) and parts.mlp is not None and not moe:
                parts = "its routers' outputs are recorded"
            if isinstance(parts, str):
                reasons.add(parts)
            else:
                checkpointed = DecoderLayer(layer, index, store, chain, parts)
        if checkpointed.random and settings.segment_layers > 1:
            raise ConfigError(
                f"segment_layers: {settings.segment_layers} runs layers again with other random"
                " numbers, and this model has dropout. Set the model's dropout to 0 or"
                " segment_layers to 1."
            )
        chunked.install(layer, chunk, moe, longest=longest)
        layer.forward = checkpointed
    _final_norm(model, layers, chunk)
    written = (isinstance(layer.forward, DecoderLayer) for layer in layers)
    if settings.keep_mlp and not any(written):
        log.warning(
            "keep_mlp: %s saves nothing: no layer of this model is hand-written (docs/layers.md).",
            settings.keep_mlp,
        )
    if reasons:
        log.info("Layers run transformers' own code, in chunks: %s.", "; ".join(sorted(reasons)))
    return store


def _attention_share(config: Any, dtype: torch.dtype) -> float:
    """Bytes of attention's output and fp32 log-sum-exp, of those of a layer's input: the largest
    of the layers.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return max(_share_of_layer(layer, dtype) for layer in layer_configs(config))


def _share_of_layer(config: Any, dtype: torch.dtype) -> float:
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if not hidden or not heads:
        return 1.0
    dims = (given or hidden // heads for given in values_of_layers(config, "head_dim"))
    dim = getattr(config, "v_head_dim", None) or max(dims)
    return float(heads * (dim + 4 / dtype.itemsize) / hidden)


_NORM_TOKENS = 8192
"""Its backward holds some 35 bytes of each number: of 131,072 tokens of width 2,880 10 GiB."""


def _final_norm(model: nn.Module, layers: nn.ModuleList, chunk: Callable[[], int | None]) -> None:
    """The norm after the last layer works on the whole sequence too, in fp32, while all that layers
    save is held: always in chunks.
    """

    def short() -> int:
        return min(chunk() or _NORM_TOKENS, _NORM_TOKENS)

    for parent in model.modules():
        if any(child is layers for child in parent.children()):
            chunked.install(parent, short, norms_only=True)
