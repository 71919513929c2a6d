"""The elementwise mathematics of a Llama-shaped decoder layer, forward and backward: RMS norm,
rotary embedding, gated SiLU.

Plain functions of tensors. On a GPU each is compiled into one or two kernels at its first use (5 to
7 s in all, once a process); where the compiler is missing or fails they run as they are, three to
four times slower, which is some 10 % of a step at 32k tokens. Sums and squares are fp32 for 16-bit
types (float64 for float64), rounded once at the end.
"""

from __future__ import annotations

import functools
import logging
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfactory.sp import probe

log = logging.getLogger(__name__)


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


_failed: set[str] = set()
_compiled: dict[str, Callable[..., Any]] = {}


def fused(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `fn` where its first argument is on a GPU. LONGFACTORY_COMPILE=0 turns it off.

    The start-up guard has a compiled copy for its own short row: torch compiles for any length at
    all, with slower kernels, what it has seen with two lengths, and most runs have one.
    """
    other = types.FunctionType(
        fn.__code__.replace(co_name=f"{fn.__name__}_in_guard"),
        fn.__globals__,
        f"{fn.__name__}_in_guard",
        fn.__defaults__,
        fn.__closure__,
    )

    @functools.wraps(fn)
    def call(first: Tensor, *rest: Any) -> Any:
        plain = fn if probe.current() is None else other
        name = plain.__name__
        if (
            not first.is_cuda
            or name in _failed
            or os.environ.get("LONGFACTORY_COMPILE", "1") == "0"
        ):
            return plain(first, *rest)
        if name not in _compiled:
            _compiled[name] = torch.compile(plain)
        try:
            return _compiled[name](first, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's many errors have no common type
            _failed.add(name)
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            log.warning("%s runs uncompiled: %s", name, reason)
            return plain(first, *rest)

    return call


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H] -> weight * x / sqrt(mean(x^2) + eps)."""
    xw = x.to(wide(x.dtype))
    r = torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (xw * r).to(x.dtype)


@fused
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx in x's dtype and the weight's gradient, [H], in the wide one."""
    xw, g = x.to(wide(x.dtype)), dy.to(wide(x.dtype))
    r = torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps)
    unit = xw * r
    dweight = (g * unit).flatten(0, -2).sum(0)
    g = g * weight.to(g.dtype)
    dx = r * (g - unit * (g * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight


@fused
def add_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, other: Tensor
) -> tuple[Tensor, Tensor]:
    """`rms_norm_backward` with `other` (the gradient that came past the norm, through the residual)
    added to dx.
    """
    xw, g = x.to(wide(x.dtype)), dy.to(wide(x.dtype))
    r = torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps)
    unit = xw * r
    dweight = (g * unit).flatten(0, -2).sum(0)
    g = g * weight.to(g.dtype)
    dx = r * (g - unit * (g * unit).mean(-1, keepdim=True))
    return (dx + other.to(dx.dtype)).to(x.dtype), dweight


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, D] with cos, sin [T, D]: x cos + (-x2, x1) sin."""
    xw, c, s = (
        x.to(wide(x.dtype)),
        cos.to(wide(x.dtype)).unsqueeze(1),
        sin.to(wide(x.dtype)).unsqueeze(1),
    )
    x1, x2 = xw.chunk(2, -1)
    return (xw * c + torch.cat((-x2, x1), -1) * s).to(x.dtype)


@fused
def rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The adjoint of `rotate`."""
    g, c, s = (
        dy.to(wide(dy.dtype)),
        cos.to(wide(dy.dtype)).unsqueeze(1),
        sin.to(wide(dy.dtype)).unsqueeze(1),
    )
    g1, g2 = (g * s).chunk(2, -1)
    return (g * c + torch.cat((g2, -g1), -1)).to(dy.dtype)


@fused
def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    g = gate.to(wide(gate.dtype))
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)


@fused
def gated_silu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(gate) * up again, dgate, dup)."""
    g, u, d = gate.to(wide(gate.dtype)), up.to(wide(gate.dtype)), dy.to(wide(gate.dtype))
    s = torch.sigmoid(g)
    silu = g * s
    return (
        (silu * u).to(gate.dtype),
        (d * u * (s + silu * (1 - s))).to(gate.dtype),
        (d * silu).to(gate.dtype),
    )
