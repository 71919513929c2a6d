"""`fp8: true`: linear layers inside the decoder multiply numbers of eight bits, through torchao.

A token's activations have a scale of their own, and so has a token's gradient; a weight's gradient
is a product of bf16. So what a token computes does not depend on which tokens lie on its device:
sequence parallelism changes nothing but the order of sums.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import nn

from longfactory.errors import UserError
from longfactory.model.adapters import router_modules
from longfactory.sp import hf
from longfactory.sp.text_model import decoder_layers

RECIPE = "rowwise_with_gw_hp"
"""torchao's name: a scale for each row of inputs and of gradients, weights' gradients in bf16."""
SPEED = (
    "It may be slower than bf16: a product took 8.85 ms against 6.07 ms on one H200"
    " (docs/methods.md)."
)
ALIGNED = 16
"""What the kernels need both widths of a layer to be a multiple of."""
LOWEST = (8, 9)
"""Compute capability of the first GPUs that multiply numbers of eight bits (Ada, Hopper)."""


def install(model: Any, device: torch.device) -> tuple[int, int]:
    """Exchanges the linear layers inside the decoder's layers, in place; their weights stay.

    Routers, adapters, towers, embeddings and the output layer stay as they are, and so do stacked
    experts and layers whose widths are no multiples of 16.

    Args:
        model: as it is trained, adapters included; not sharded yet.
        device: where it will compute; on a CPU the arithmetic is emulated.
    Returns:
        (layers that were exchanged, weights in them).
    Raises:
        UserError: torchao is missing, the GPU has no such arithmetic, or no layer can take it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError('fp8: torchao is not installed. Run: pip install "longfactory[fp8]"')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LOWEST:
        raise UserError(
            f"fp8: {torch.cuda.get_device_name(device)} has no FP8 matrix multiplication "
            "(compute capability 8.9 or later is needed). Use bf16: true alone."
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    base = Float8LinearConfig.from_recipe_name(RECIPE)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    config = Float8LinearConfig(**(fields | {"emulate": device.type != "cuda"}))

    inner = hf.unwrap(model)
    kept = router_modules(inner)

    def takes(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or any(part in name for part in ("lora_", "oft_")):
            return False
        widths = (module.in_features, module.out_features)
        return id(module) not in kept and not any(width % ALIGNED for width in widths)

    layers = decoder_layers(inner)[1]
    convert_to_float8_training(layers, config=config, module_filter_fn=takes)
    found = [m for m in layers.modules() if isinstance(m, Float8Linear)]
    if not found:
        raise UserError(
            "fp8: the decoder has no linear layer whose widths are multiples of 16 (stacked experts"
            " and quantised layers do not count). Use bf16: true alone."
        )
    if device.type == "cpu":
        for module in found:
            module.__class__ = _under_autocast(Float8Linear)
    return len(found), sum(m.weight.numel() for m in found)


@functools.cache
def _under_autocast(kind: Any) -> Any:
    """torchao's layer with autocast on a CPU, in which it takes part on a GPU alone."""

    class Float8Linear(kind):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                x = x.to(torch.get_autocast_dtype("cpu"))
            y: torch.Tensor = super().forward(x)
            return y

    return Float8Linear
