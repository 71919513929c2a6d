"""Which modules of experts `model.experts` computes, and in which kernels."""

from __future__ import annotations

from typing import Any

from torch import nn


def of_interface(module: nn.Module) -> bool:
    """Whether a module holds experts that transformers computes through its experts interface."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate"))


def gates_plainly(base: Any) -> bool:
    """Whether the gate is transformers' own, silu of the first half times the second."""
    from transformers.integrations.moe import _default_apply_gate

    plain = type(base)._apply_gate is _default_apply_gate
    return base.has_gate and plain and type(base.act_fn).__name__ in ("SiLU", "SiLUActivation")


def gates_clamped(base: Any) -> bool:
    """Whether the gate is gpt-oss's own."""
    own = getattr(type(base)._apply_gate, "__qualname__", "") == "GptOssExperts._apply_gate"
    return own and base.has_gate and hasattr(base, "alpha") and hasattr(base, "limit")


def gates_in_one_kernel(layer: nn.Module) -> bool:
    """Whether all routed experts of a layer are computed so, by grouped products between a gate
    that stores its input alone.
    """
    found = [module for module in layer.modules() if of_interface(module)]
    return bool(found) and all(gates_plainly(m) or gates_clamped(m) for m in found)


def have_biases(layer: nn.Module) -> bool:
    """Whether routed experts of a layer have biases."""
    return any(of_interface(module) and module.has_bias for module in layer.modules())
