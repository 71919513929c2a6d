"""What stands for the MLP in a layer that has several modules there: they run as they are, and
autograd differentiates them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Sum(nn.Module):
    """Experts and a dense MLP at the same input (Granite)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        first, *others = (_first(part(hidden)) for part in self.parts)
        for other in others:
            first = first + other
        return first


class MixtureBeside(nn.Module):
    """An MLP and experts, each between norms of its own, and a router that sees what comes before
    them (Gemma 4). The modules are those of the layer.
    """

    PARTS = (
        "mlp",
        "router",
        "experts",
        "pre_feedforward_layernorm",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
    )

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in self.PARTS:
            setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H], before any norm -> [..., H]"""
        parts: Any = self
        dense = parts.mlp(parts.pre_feedforward_layernorm(hidden))
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, chosen = parts.router(flat)
        routed = parts.experts(parts.pre_feedforward_layernorm_2(flat), chosen, weights)
        routed = parts.post_feedforward_layernorm_2(routed.reshape(hidden.shape))
        return parts.post_feedforward_layernorm_1(dense) + routed  # type: ignore[no-any-return]


def _first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]
