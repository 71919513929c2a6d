"""The elementwise mathematics of the hand-written decoder layer, forward and backward: norms,
rotary embedding, gated activations.

Plain functions of tensors. On a GPU each is compiled into one or two kernels (`compiled.fused`);
where it is not they run as they are, three to four times slower, which is some 10 % of a step at
32k tokens. Sums and squares are fp32 for 16-bit types (float64 for float64), rounded once at the
end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from longfactory.memory.compiled import fused


def autocast_as_now(device: str) -> Callable[[], torch.autocast]:
    """Makes contexts of the autocast that is on now, for what backward runs again. `device`: a
    device's type.
    """
    return functools.partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tokens are kept: fp32 for 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@fused("x")
def norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    mean: bool = False,
    zero_centred: bool = False,
    wide_weight: bool = False,
) -> Tensor:
    """[..., H] -> weight * x / sqrt(mean(x^2) + eps), RMS norm.

    Args:
        weight: of the last dimensions of x; None for 1.
        mean: the mean of x is taken off first (layer norm).
        zero_centred: the factor is 1 + weight.
        wide_weight: the product with the weight is rounded, not x / sqrt(...) alone.
    """
    xw = x.to(wide(x.dtype))
    if mean:
        xw = xw - xw.mean(-1, keepdim=True)
    unit = xw * torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return unit.to(x.dtype)
    if not wide_weight:
        return weight * unit.to(x.dtype)
    factor = weight.to(unit.dtype)
    return (unit * (1.0 + factor if zero_centred else factor)).to(x.dtype)


@fused("dy", "x", "other")
def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    mean: bool = False,
    zero_centred: bool = False,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx in x's dtype, and the weight's gradient in the wide one.

    Args:
        other: added to dx: the gradient that came past the norm, through the residual.
    """
    xw, g = x.to(wide(x.dtype)), dy.to(wide(x.dtype))
    if mean:
        xw = xw - xw.mean(-1, keepdim=True)
    r = torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps)
    unit = xw * r
    dweight = None
    if weight is not None:
        # [..., H] -> [tokens, *weight.shape]
        dweight = (g * unit).flatten(0, -1 - weight.dim()).sum(0)
        factor = weight.to(g.dtype)
        g = g * (1.0 + factor if zero_centred else factor)
    dx = r * (g - unit * (g * unit).mean(-1, keepdim=True))
    if mean:
        dx = dx - dx.mean(-1, keepdim=True)
    if other is not None:
        dx = dx + other.to(dx.dtype)
    return dx.to(x.dtype), dweight


def row_norms(weight: Tensor, low: Tensor, scale: float) -> Tensor:
    """|weight + scale * low| of each row, [out, in] both -> [out], in the weight's type. Without a
    gradient.
    """
    # of a Parameter torch takes the sizes for constant, and would compile for each linear's
    return _row_norms(weight.detach(), low, scale)


@fused("weight", "low")
def _row_norms(weight: Tensor, low: Tensor, scale: float) -> Tensor:
    whole = weight.to(wide(weight.dtype)) + scale * low.to(wide(low.dtype))
    return whole.pow(2).sum(1).sqrt().to(weight.dtype)


@fused("y")
def scaled(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """y * factor + bias, of each output: [C, out]."""
    made = y.to(factor.dtype) * factor
    return (made if bias is None else made + bias.to(factor.dtype)).to(y.dtype)


@fused("g")
def scaled_gradient(g: Tensor, factor: Tensor) -> Tensor:
    """The gradient of `scaled`'s y."""
    return (g.to(factor.dtype) * factor).to(g.dtype)


@fused("g", "y")
def column_products(g: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """The sum over tokens of g * (y - bias): [C, out] -> [out], in the wide type."""
    made = y.to(wide(y.dtype))
    if bias is not None:
        made = made - bias.to(made.dtype)
    return (g.to(made.dtype) * made).sum(0)


def _grouped(x: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """[..., H] -> [..., groups, H / groups] of length 1, and [..., groups, 1] what x was multiplied
    by.
    """
    parts = x.unflatten(-1, (groups, -1))
    factor = torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    return parts * factor, factor


@fused("x", "gate")
def gated_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str = "silu",
    gate_first: bool = False,
    groups: int = 1,
    wide_weight: bool = False,
) -> Tensor:
    """[..., H] -> weight * norm(x) * activation(gate), RMS norm.

    Args:
        gate_first: weight * norm(x * activation(gate)).
        groups: of H, each with a length of its own.
        wide_weight: the product with the weight is rounded, not norm(x) alone.
    """
    value, _ = _activated(gate.to(wide(x.dtype)), activation)
    xw = x.to(value.dtype)
    unit = _grouped(xw * value if gate_first else xw, eps, groups)[0].flatten(-2)
    y = weight * (unit if wide_weight else unit.to(x.dtype))
    if gate_first and not wide_weight:
        return y
    return (y if gate_first else y * value).to(x.dtype)


@fused("dy", "x", "gate")
def gated_norm_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str = "silu",
    gate_first: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dgate in their own types, and the weight's gradient in the wide one."""
    value, slope = _activated(gate.to(wide(x.dtype)), activation)
    xw, g = x.to(value.dtype), dy.to(value.dtype)
    unit, factor = _grouped(xw * value if gate_first else xw, eps, groups)
    flat = unit.flatten(-2)
    weighted = weight.to(g.dtype) * flat
    dgate = g * weighted * slope
    if not gate_first:
        g = g * value
    dweight = (g * flat).flatten(0, -2).sum(0)
    parts = (g * weight.to(g.dtype)).unflatten(-1, (groups, -1))
    dx = (factor * (parts - unit * (parts * unit).mean(-1, keepdim=True))).flatten(-2)
    if gate_first:
        dgate, dx = dx * xw * slope, dx * value
    return dx.to(x.dtype), dgate.to(gate.dtype), dweight


HALVES, INTERLEAVED, GATHERED = "halves", "interleaved", "gathered"
"""Which dims of a head turn together, i with i + R/2 or 2i with 2i + 1; GATHERED: the latter, laid
out as the former afterwards."""


def _pair(x: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    if pairs == HALVES:
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., ::2], x[..., 1::2]


def _joined(first: Tensor, second: Tensor, pairs: str) -> Tensor:
    if pairs == INTERLEAVED:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


@fused("x", "cos", "sin")
def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str = HALVES, last: bool = False) -> Tensor:
    """Rotary embedding of [T, heads, D] by the angles of R/2 pairs of dims: cos, sin [T, R/2].

    Args:
        pairs: see `HALVES`.
        last: the last R dims of a head turn, else the first.
    """
    turned = 2 * cos.shape[-1]
    xw = x.to(wide(x.dtype))
    c, s = cos.to(xw.dtype).unsqueeze(1), sin.to(xw.dtype).unsqueeze(1)
    part = xw[..., -turned:] if last else xw[..., :turned]
    x1, x2 = _pair(part, pairs)
    y = _joined(x1 * c - x2 * s, x2 * c + x1 * s, pairs)
    if turned < x.shape[-1]:
        kept = xw[..., :-turned] if last else xw[..., turned:]
        y = torch.cat((kept, y) if last else (y, kept), -1)
    return y.to(x.dtype)


@fused("dy", "cos", "sin")
def rotate_backward(
    dy: Tensor, cos: Tensor, sin: Tensor, pairs: str = HALVES, last: bool = False
) -> Tensor:
    """The adjoint of `rotate`."""
    turned = 2 * cos.shape[-1]
    g = dy.to(wide(dy.dtype))
    c, s = cos.to(g.dtype).unsqueeze(1), sin.to(g.dtype).unsqueeze(1)
    part = g[..., -turned:] if last else g[..., :turned]
    g1, g2 = _pair(part, INTERLEAVED if pairs == INTERLEAVED else HALVES)
    dx = _joined(g1 * c + g2 * s, g2 * c - g1 * s, HALVES if pairs == HALVES else INTERLEAVED)
    if turned < dy.shape[-1]:
        kept = g[..., :-turned] if last else g[..., turned:]
        dx = torch.cat((kept, dx) if last else (dx, kept), -1)
    return dx.to(dy.dtype)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
"""transformers' names of the gates' activations that are computed here -> ours."""
_TANH = 0.7978845608028654  # sqrt(2 / pi)
_CUBIC = 0.044715


def _activated(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if activation == "silu":
        s = torch.sigmoid(g)
        value = g * s
        return value, s + value * (1 - s)
    if activation == "sigmoid":
        s = torch.sigmoid(g)
        return s, s * (1 - s)
    if activation == "softplus":
        return torch.nn.functional.softplus(g), torch.sigmoid(g)
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(g * 0.7071067811865476))
        return g * share, share + g * torch.exp(-0.5 * g * g) * 0.3989422804014327
    t = torch.tanh(_TANH * (g + _CUBIC * g * g * g))
    half = 0.5 * (1 + t)
    slope = half + 0.5 * g * (1 - t * t) * _TANH * (1 + 3 * _CUBIC * g * g)
    return g * half, slope


@fused("gate", "up")
def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up."""
    value, _ = _activated(gate.to(wide(gate.dtype)), activation)
    return (value * up.to(value.dtype)).to(gate.dtype)


@fused("dy", "gate", "up")
def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """(activation(gate) * up again, dgate, dup)."""
    u, d = up.to(wide(gate.dtype)), dy.to(wide(gate.dtype))
    value, slope = _activated(gate.to(u.dtype), activation)
    return (
        (value * u).to(gate.dtype),
        (d * u * slope).to(gate.dtype),
        (d * value).to(gate.dtype),
    )


@fused("x", "gate")
def output_gated(x: Tensor, gate: Tensor, activation: str = "sigmoid") -> Tensor:
    """x * activation(gate): [C, heads, D] and [C, heads, D or 1]."""
    value, _ = _activated(gate.to(wide(x.dtype)), activation)
    return (x.to(value.dtype) * value).to(x.dtype)


@fused("dy", "x", "gate")
def output_gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, activation: str = "sigmoid"
) -> tuple[Tensor, Tensor]:
    """dx and dgate of `output_gated`."""
    value, slope = _activated(gate.to(wide(x.dtype)), activation)
    d = dy.to(value.dtype)
    dgate = d * x.to(d.dtype) * slope
    if gate.shape[-1] == 1:
        dgate = dgate.sum(-1, keepdim=True)
    return (d * value).to(x.dtype), dgate.to(x.dtype)
