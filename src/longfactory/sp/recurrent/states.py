"""Chunks by PyTorch: the states that follow one another, and how stretches change them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .fragments import Chunks
from .within import Within

Steps = list[tuple[int, int]]


def scan(x: Within, steps: Steps, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk, and after the last ones.

    Args:
        start: [F, h, Dk, Dv] of each fragment.

    Returns:
        states [N, h, Dk, Dv], values written [N, h, C, Dv], ends [F, h, Dk, Dv].
    """
    return _Scan.apply(x.kd, x.w, x.u, x.decay, start, steps)  # type: ignore[no-any-return]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kd: Tensor,
        w: Tensor | None,
        u: Tensor,
        decay: Tensor,
        start: Tensor,
        steps: Steps,
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = u.new_empty(u.shape[0], u.shape[1], kd.shape[3], u.shape[3])
        state = start.to(u.dtype).clone()
        if w is None:
            written, added = u, kd.transpose(-1, -2) @ u
            for a, b in steps:
                current = state[: b - a]
                states[a:b] = current
                torch.addcmul(added[a:b], decay[a:b], current, out=current)
        else:
            written = torch.empty_like(u)
            for a, b in steps:
                current = state[: b - a]
                states[a:b] = current
                torch.sub(u[a:b], w[a:b] @ current, out=written[a:b])
                added = kd[a:b].transpose(-1, -2) @ written[a:b]
                torch.addcmul(added, decay[a:b], current, out=current)
        ctx.save_for_backward(kd, w, written, decay, states)
        ctx.steps = steps
        return states, written.clone() if w is None else written, state

    @staticmethod
    def backward(
        ctx: Any, d_states: Tensor, d_written: Tensor, d_ends: Tensor
    ) -> tuple[Tensor | None, ...]:
        kd, w, written, decay, states = ctx.saved_tensors
        after, du, d_start = reverse(kd, w, decay, d_states, d_written, d_ends, ctx.steps)
        dkd = written @ after.transpose(-1, -2)
        dw = None if w is None else -(du @ states.transpose(-1, -2))
        d_decay = after * states
        d_decay = d_decay.sum(-1, keepdim=True)
        if decay.shape[2] == 1:
            d_decay = d_decay.sum(2, keepdim=True)
        return dkd, dw, du, d_decay, d_start, None


def reverse(
    kd: Tensor,
    w: Tensor | None,
    decay: Tensor,
    d_states: Tensor,
    d_written: Tensor,
    d_ends: Tensor,
    steps: Steps,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan's adjoint: from the gradients of its results to those of the states after each
    chunk, of what the chunks write, and of the fragments' first states.
    """
    after = torch.empty_like(d_states)
    grad = d_ends.clone()
    if w is None:
        for a, b in reversed(steps):
            current = grad[: b - a]
            after[a:b] = current
            torch.addcmul(d_states[a:b], decay[a:b], current, out=current)
        return (
            after,
            torch.baddbmm(_flat(d_written), _flat(kd), _flat(after)).view_as(d_written),
            grad,
        )
    du = torch.empty_like(d_written)
    for a, b in reversed(steps):
        current = grad[: b - a]
        after[a:b] = current
        torch.add(d_written[a:b], kd[a:b] @ current, out=du[a:b])
        before = d_states[a:b] - w[a:b].transpose(-1, -2) @ du[a:b]
        torch.addcmul(before, decay[a:b], current, out=current)
    return after, du, grad


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


@dataclasses.dataclass
class Changes:
    """How open fragments change a state: after = matrix . before + state.

    Attributes:
        state: [F, H, Dk, Dv].
        matrix: [F, H, Dk, Dk] for deltas, else [F, H, 1 or Dk, 1], numbers to multiply with.
    """

    state: Tensor
    matrix: Tensor


def changes(x: Within, chunks: Chunks, chosen: list[int]) -> Changes:
    """Of the fragments at these places of `chunks.order`, for some heads."""
    index, steps = chunks.part(chosen)
    index = index.to(x.u.device)
    kd, u, decay = (t.index_select(0, index) for t in (x.kd, x.u, x.decay))
    dim, heads = kd.shape[3], kd.shape[1]
    zero = u.new_zeros(len(chosen), heads, dim, u.shape[3])
    if x.w is None:
        *_, ends = _Scan.apply(kd, None, u, decay, zero, steps)
        whole = torch.ones_like(decay[: len(chosen)])
        for a, b in steps:
            whole[: b - a] *= decay[a:b]
        return Changes(ends, whole)
    w = x.w.index_select(0, index)
    start = torch.cat([zero, _identity(zero, dim)], -1)
    wide = torch.cat([u, u.new_zeros(*u.shape[:3], dim)], -1)
    *_, ends = _Scan.apply(kd, w, wide, decay, start, steps)
    return Changes(ends[..., : u.shape[3]], ends[..., u.shape[3] :])


def _identity(like: Tensor, size: int) -> Tensor:
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.expand(*like.shape[:2], size, size)


def applied(matrix: Tensor, state: Tensor, transposed: bool = False) -> Tensor:
    """What becomes of a state by a fragment's matrix."""
    if matrix.shape[-1] == 1:
        return matrix * state
    return (matrix.transpose(-1, -2) if transposed else matrix) @ state
