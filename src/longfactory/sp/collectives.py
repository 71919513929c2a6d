"""Collectives whose backward is their exact adjoint, for any group and any backend. With group None
they do nothing.

The adjoint rule: with L the sum over ranks of each rank's loss, every gradient that arrives is
dL/d(output) and every gradient that leaves is dL/d(input).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import RowPlan

Group: TypeAlias = dist.ProcessGroup | None
_Run: TypeAlias = Callable[[Tensor, dist.ProcessGroup], Tensor]

# torch 2.13 renames these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[m, ...] of every rank -> [n * m, ...]. Backward: reduce_scatter."""
    return _with_adjoint(x, group, raw_all_gather, raw_reduce_scatter)


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks of [n * m, ...], of which rank r keeps the r-th part [m, ...]. Backward:
    all_gather.
    """
    return _with_adjoint(x, group, raw_reduce_scatter, raw_all_gather)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks. Backward: the sum over ranks of the gradients."""
    return _with_adjoint(x, group, _summed, _summed)


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """[n, ...]: x[d] goes to rank d, and the result's [s] came from rank s. Backward: the same
    exchange.
    """
    return _with_adjoint(x, group, raw_all_to_all, raw_all_to_all)


def shard(x: Tensor, plan: RowPlan) -> Tensor:
    """[T, ...] -> [T/n, ...]: this rank's rows, in local order. Differentiable.

    Raises:
        ValueError: x does not have the row's length.
    """
    if x.shape[0] != plan.length:
        raise ValueError(f"The plan is for {plan.length} tokens, the tensor has {x.shape[0]} rows.")
    intervals = plan.layout.intervals[plan.ctx.rank]
    return (
        x[intervals[0][0] : intervals[0][1]]
        if len(intervals) == 1
        else torch.cat([x[a:b] for a, b in intervals])
    )


def gather(x: Tensor, plan: RowPlan) -> Tensor:
    """[T/n, ...] of every rank -> [T, ...] in natural order, on every rank. Backward: the sum over
    ranks of the rows' gradients.

    Raises:
        ValueError: x does not have the plan's local length.
    """
    if x.shape[0] != plan.local_length:
        raise ValueError(
            f"The plan gives this rank {plan.local_length} tokens, the tensor has {x.shape[0]}"
            " rows."
        )
    parts = all_gather(x, plan.ctx.group)
    order = plan._natural_runs
    return parts if len(order) == 1 else torch.cat([parts[at : at + b - a] for at, a, b in order])


def _new(x: Tensor, *shape: int) -> Tensor:
    # Never empty_like: it keeps permuted strides, and a collective fills the raw memory.
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def raw_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[a, ...] of each rank -> [n * a, ...] in the ranks' order. Without autograd."""
    n = dist.get_world_size(group)
    flat = x.contiguous().reshape(-1)
    out = _new(x, n * flat.numel())
    _all_gather(out, flat, group=group)
    return out.view(n * x.shape[0], *x.shape[1:]) if x.dim() else out


def raw_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n * a, ...] -> [a, ...]: this rank's share of the sum over ranks. Without autograd.

    Raises:
        ValueError: the ranks do not divide the rows.
    """
    n = dist.get_world_size(group)
    if x.shape[0] % n:
        raise ValueError(f"{x.shape[0]} rows do not divide over {n} ranks.")
    flat = x.contiguous().reshape(-1)
    out = _new(x, flat.numel() // n)
    _reduce_scatter(out, flat, group=group)
    return out.view(x.shape[0] // n, *x.shape[1:])


def raw_all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] -> [n, ...]: entry i goes to rank i, entry j comes from rank j. No autograd."""
    x = x.contiguous()
    out = _new(x, *x.shape)
    dist.all_to_all_single(out.view(-1), x.view(-1), group=group)
    return out


def _with_adjoint(x: Tensor, group: Group, run: _Run, adjoint: _Run) -> Tensor:
    return x if group is None else _Collective.apply(x, group, run, adjoint)  # type: ignore[no-any-return]


class _Collective(torch.autograd.Function):
    """`run(x, group)`, whose adjoint is `adjoint(grad, group)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, run: _Run, adjoint: _Run) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.adjoint = group, adjoint
        return run(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.adjoint(grad, ctx.group), None, None, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x
