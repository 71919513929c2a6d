"""A hand-written layer's forward and backward pass over a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longfactory.memory.layer.attention_half import (
    attention,
    attention_backward,
    keys_values,
    projections_backward,
)
from longfactory.memory.layer.linears import LayerCall, Sums
from longfactory.memory.layer.mlp_half import mlp_backward, mlp_forward
from longfactory.memory.offload import Pair


def forward(x: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H] -> y [T, H], and attention's out [T, heads, Dv] and log-sum-exp."""
    # Types are chosen here; what autocast would add is a cast of every fp32 sum.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        k, v = keys_values(x, call)
        out, lse = attention(x, k, v, call)
        del k, v
        flat = out.view(x.shape[0], -1)
        y = torch.empty_like(x)
        for s in call.chunks(x.shape[0]):
            mlp_forward(x, flat, y, s, call)
        if call.scalar is not None:
            y *= call.scalar
    return y, out, lse


def backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    saved: list[Pair] | None,
    call: LayerCall,
    needed: Sequence[bool],
    late: Callable[[], None] | None = None,
) -> list[Tensor | None]:
    """The gradients of the call's weights. `dx` := that of x; it may be dy itself.

    Args:
        x, dy, dx: [T, H].
        saved: [(out, lse)] of attention, or None; its tensors are written to.
        needed: of each of the call's names.
        late: called when attention's backward is done.
    """
    T = x.shape[0]
    sums = Sums(call, needed, call.count(T))
    k = v = None
    if saved is None:
        k, v = keys_values(x, call)
        out, lse = attention(x, k, v, call)
    else:
        ((out, lse),) = saved
    del saved
    flat = out.view(T, -1)
    da = torch.empty_like(x) if call.shape.separate_gradient else dx
    pending = torch.empty_like(x) if call.shape.parallel else None
    mlp_backward(x, flat, dy, dx, da, pending, call, sums)
    call.products = call.kept = None
    sums.settle()
    if call.groups == 1 and call.count(T) == 1:
        call.before_norm = {}
    if k is None or v is None:
        k, v = keys_values(x, call)
    dq, of_keys, dgate = attention_backward(x, flat, lse, da, k, v, call, sums)
    del k, v, out, flat, lse, da
    if late is not None:
        late()
    projections_backward(x, dq, of_keys, dgate, dx, pending, call, sums)
    call.before_norm = None
    return sums.result()
