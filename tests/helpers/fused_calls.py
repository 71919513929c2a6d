"""Calls of every function that is compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from longfactory.memory import layer_ops
from longfactory.model import expert_ops, logit_ops


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """A call of each function, of more tokens than are compared; widths are no multiples of them."""
    tokens, width, picks, experts = 150, 24, 3, 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, y, dy = (draw(tokens, width) for _ in range(3))
    weight = draw(width)
    heads, angles = draw(tokens, 2, 12), torch.randn(2, tokens, 4, device=device)
    of_heads, biases = draw(12), draw(experts, width)
    expert = torch.randint(experts, (tokens * picks,), device=device).sort().values
    order = torch.randperm(tokens * picks, device=device)
    back, of_tokens = order.argsort(), expert.view(tokens, picks)
    pairs, chosen = draw(tokens * picks, width), torch.rand(tokens, picks, device=device)
    logits, labels = draw(tokens, 200), torch.randint(200, (tokens,), device=device)
    lse = torch.full((tokens,), 6.0, device=device)
    ops, mixed = layer_ops, expert_ops
    return {
        "norm": lambda: ops.norm(x, weight, 1e-6, True),
        "norm_backward": lambda: ops.norm_backward(dy, x, weight, 1e-6, False, False, y),
        "norm_backward of heads": lambda: ops.norm_backward(heads, heads, of_heads, 1e-6),
        "norm_backward without weight": lambda: ops.norm_backward(dy, x, None, 1e-6),
        "row_norms": lambda: ops.row_norms(x, y, 0.5),
        "scaled": lambda: ops.scaled(x, weight, None),
        "scaled_gradient": lambda: ops.scaled_gradient(x, weight),
        "column_products": lambda: ops.column_products(dy, x, weight),
        "gated_norm": lambda: ops.gated_norm(x, y, weight, 1e-6),
        "gated_norm_backward": lambda: ops.gated_norm_backward(dy, x, y, weight, 1e-6),
        "rotate": lambda: ops.rotate(heads, *angles),
        "rotate_backward": lambda: ops.rotate_backward(heads, *angles),
        "gated": lambda: ops.gated(x, y),
        "gated_backward": lambda: ops.gated_backward(dy, x, y),
        "output_gated": lambda: ops.output_gated(x, y),
        "output_gated of heads": lambda: ops.output_gated(heads, heads[..., :1], "softplus"),
        "output_gated_backward": lambda: ops.output_gated_backward(dy, x, y),
        "output_gated_backward of heads": lambda: ops.output_gated_backward(
            heads, heads, heads[..., :1], "softplus"
        ),
        "sum_over_picks": lambda: mixed.sum_over_picks(pairs, back, picks, torch.bfloat16),
        "weighted_sum": lambda: mixed.weighted_sum(pairs, chosen, back, x, of_tokens),
        "weighted_sum and bias": lambda: mixed.weighted_sum(
            pairs, chosen, back, x, of_tokens, biases
        ),
        "weighted_sum_backward": lambda: mixed.weighted_sum_backward(
            dy, pairs, chosen, order, expert
        ),
        "weighted_sum_backward and bias": lambda: mixed.weighted_sum_backward(
            dy, pairs, chosen, order, expert, biases
        ),
        "expert gated": lambda: mixed.gated(pairs),
        "expert gated_backward": lambda: mixed.gated_backward(pairs[:, :12], pairs),
        "clamped": lambda: mixed.clamped(pairs, expert, 1.7, 7.0),
        "clamped and bias": lambda: mixed.clamped(pairs, expert, 1.7, 7.0, biases),
        "clamped_backward": lambda: mixed.clamped_backward(pairs[:, :12], pairs, expert, 1.7, 7.0),
        "clamped_backward and bias": lambda: mixed.clamped_backward(
            pairs[:, :12], pairs, expert, 1.7, 7.0, biases
        ),
        "statistics": lambda: logit_ops.statistics(logits, labels, 1.0, None),
        "_softmax_gradient": lambda: logit_ops._softmax_gradient(logits, lse, lse, 1.0, None),
    }
