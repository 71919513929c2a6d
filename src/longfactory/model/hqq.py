"""`quantization_method: hqq`: linear layers inside the decoder hold their weights in one to eight
bits, by the half-quadratic quantisation of the package hqq, and LoRA trains beside them.

transformers reads checkpoints that are stored so, and does not quantise by it while loading: here
the weights are read as they are, and each layer is quantised on the device where it will compute.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longfactory.errors import UserError
from longfactory.model.adapters import router_modules
from longfactory.sp import hf
from longfactory.sp.text_model import decoder_layers

GROUP = 64
"""Weights that share a scale and a zero point."""
AXIS = 0
"""Of the weight [out, in]: groups run over outputs, as in LLaMA-Factory's runs."""


@dataclass(frozen=True)
class Hqq:
    """How weights are quantised.

    Args:
        bits: of a weight.
        dtype: that the layers compute in, and that scales are held in.
    """

    bits: int
    dtype: torch.dtype


def settings(bits: int, dtype: torch.dtype) -> Hqq:
    """`quantization_bit: bits` with `quantization_method: hqq`.

    Raises:
        UserError: hqq is not installed.
    """
    if importlib.util.find_spec("hqq") is None:
        raise UserError('quantization_method: hqq needs hqq. Run: pip install "longfactory[hqq]"')
    return Hqq(bits, dtype)


def install(model: Any, quantization: Hqq, device: torch.device) -> int:
    """Exchanges the linear layers inside the decoder's layers, in place, and moves the model to the
    device. Routers, towers, embeddings, the output layer and stacked experts stay as they are.

    Args:
        model: as it was loaded, without adapters.
        quantization: how.
        device: where it will compute.
    Returns:
        Weights that are quantised now.
    Raises:
        UserError: a layer's number of weights is no multiple of 64, or no layer was found.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model.requires_grad_(False)
    settings = BaseQuantizeConfig(nbits=quantization.bits, group_size=GROUP, axis=AXIS)
    inner = hf.unwrap(model)
    kept = router_modules(inner)
    layers = decoder_layers(inner)[1]
    found = {
        name: module
        for name, module in layers.named_modules()
        if type(module) is nn.Linear and id(module) not in kept
    }
    if not found:
        raise UserError(
            "quantization_method: hqq: the decoder has no linear layers (stacked experts are none)."
            " Leave quantization_bit out."
        )
    count = 0
    for name, module in found.items():
        if module.weight.numel() % GROUP:
            raise UserError(
                f"quantization_method: hqq: {name} has {tuple(module.weight.shape)} weights, which"
                f" groups of {GROUP} do not divide. Use quantization_method: bnb."
            )
        count += module.weight.numel()
        shape = tuple(module.weight.shape)
        layer = HQQLinear(module, settings, compute_dtype=quantization.dtype, device=str(device))
        layer.W_q.stands_for = shape
        layers.set_submodule(name, layer)
    model.to(device)
    return count


def layer_of(model: Any, name: str) -> Any:
    """The layer of hqq whose packed weights the parameter `name` is; None for all others."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner) if leaf == "W_q" else None


def bytes_of_scales(layer: Any) -> int:
    """What a layer of hqq holds beside its packed weights; 0 for None."""
    held = () if layer is None else (layer.meta["scale"], layer.meta["zero"])
    return sum(x.numel() * x.element_size() for x in held)
