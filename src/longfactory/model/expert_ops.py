"""What stands around the grouped products of routed experts, forward and backward: gate, sums over
a token's experts, weights.

Plain functions of tensors, compiled into one or two kernels on a GPU (`memory.compiled`). Sums and
products are float32 for 16-bit types, rounded once at the end.

Letters in shapes: T tokens, K experts of each, S = T K pairs sorted by expert. `order` [S] is the
pair's number in the tokens' order, `back` [S] its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longfactory.memory.compiled import fused
from longfactory.memory.layer_ops import wide


@fused("back", unit="picks")
def sum_over_picks(y: Tensor, back: Tensor, picks: int, dtype: torch.dtype) -> Tensor:
    """[S, H] -> [T, H] in `dtype`: the sum over each token's experts."""
    # [S, H] -> [T, K, H]
    return y[back].view(-1, picks, y.shape[1]).to(wide(y.dtype)).sum(1).to(dtype)


@fused("weights", "back", "chosen")
def weighted_sum(
    y: Tensor,
    weights: Tensor,
    back: Tensor,
    like: Tensor,
    chosen: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """[S, H] and weights [T, K] -> [T, H] in the type of `like`.

    Args:
        chosen: [T, K], each token's experts.
        bias: [E, H] of each expert, added to y.
    """
    inner = torch.promote_types(wide(y.dtype), wide(weights.dtype))
    # [S, H] -> [T, K, H]
    found = y[back].view(*weights.shape, y.shape[1]).to(inner)
    if bias is not None:
        found = found + bias[chosen].to(inner)
    return (found * weights.to(inner).unsqueeze(-1)).sum(1).to(like.dtype)


@fused("y", "order", "expert")
def weighted_sum_backward(
    dout: Tensor,
    y: Tensor,
    weights: Tensor,
    order: Tensor,
    expert: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of dout [T, H]: the gradient of y [S, H], and [S] those of the weights, in the pairs' order
    and the wide type.

    Args:
        expert: [S], each pair's expert.
        bias: [E, H] of each expert, added to y.
    """
    inner = torch.promote_types(wide(y.dtype), wide(weights.dtype))
    sent = dout[order // weights.shape[1]].to(inner)
    own = weights.reshape(-1)[order].to(inner)
    found = y.to(inner)
    if bias is not None:
        found = found + bias[expert].to(inner)
    return (sent * own.unsqueeze(-1)).to(y.dtype), (sent * found).sum(-1)


@fused("x")
def gated(x: Tensor) -> Tensor:
    """[S, 2 I] -> [S, I]: silu of the first half times the second."""
    gate, up = x.to(wide(x.dtype)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


@fused("dy", "x")
def gated_backward(dy: Tensor, x: Tensor) -> Tensor:
    """[S, 2 I], the gradient of x."""
    gate, up = x.to(wide(x.dtype)).chunk(2, -1)
    g = dy.to(gate.dtype)
    s = torch.sigmoid(gate)
    silu = gate * s
    return torch.cat((g * up * (s + silu * (1 - s)), g * silu), -1).to(x.dtype)


def _gate_and_up(x: Tensor, expert: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """gpt-oss's [S, 2 I], where gate and up stand side by side, each pair's expert [S] and the
    bias [E, 2 I] of each -> [S, I] and [S, I], in the wide type.
    """
    both = x.to(wide(x.dtype))
    if bias is not None:
        both = both + bias[expert].to(both.dtype)
    gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
    return gate, up


@fused("x", "expert")
def clamped(
    x: Tensor,
    expert: Tensor,
    alpha: float,
    limit: float,
    bias: Tensor | None = None,
) -> Tensor:
    """[S, 2 I] -> [S, I] as gpt-oss: gate and up are clamped, (up + 1) gate sigmoid(alpha gate).

    Args:
        expert, bias: see `_gate_and_up`.
    """
    gate, up = _gate_and_up(x, expert, bias)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(x.dtype)


@fused("dy", "x", "expert")
def clamped_backward(
    dy: Tensor,
    x: Tensor,
    expert: Tensor,
    alpha: float,
    limit: float,
    bias: Tensor | None = None,
) -> Tensor:
    """[S, 2 I], the gradient of x; none of what was cut off."""
    gate, up = _gate_and_up(x, expert, bias)
    g = dy.to(gate.dtype)
    inside = (gate <= limit, (up >= -limit) & (up <= limit))
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    s = torch.sigmoid(alpha * gate)
    dgate = g * (up + 1) * (s + alpha * gate * s * (1 - s)) * inside[0]
    dup = g * gate * s * inside[1]
    return torch.stack((dgate, dup), -1).flatten(-2).to(x.dtype)
