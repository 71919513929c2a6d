"""Keys and values go round a ring; each rank computes its tiles against what passes. Liu et al., Ring Attention, 2023.

Zigzag chunks make the work of a causal document equal on every rank and at every step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kernels
from ..kernels import Call
from ..merge import Output, Sum, accumulator_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """out (in the dtype in which it was accumulated) and lse."""
    plan, mask = call.plan, call.mask
    rank, group = plan.ring_rank, plan.axes.ring
    bulk = kernels.bulk(q, v, call)
    total = Output(q.shape[0], once=mask.merges_once(mask.ring_order, bulk) and not call.sinks)
    travelling = _pack(k, v) if mask.last_step else None
    for step, source in enumerate(mask.ring_order):
        moving = None
        if step < mask.last_step:
            assert travelling is not None
            moving = Exchange(travelling, rank + 1, rank - 1, group)  # under way while this step computes
        for tile in mask.tiles(source, bulk):
            kernels.forward(q, k, v, tile, call, total)
        if moving is not None:
            travelling = moving.wait()
            k, v = _unpack(travelling, k, v)
    assert total.out is not None and total.lse is not None
    return total.out, total.lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv as accumulated. Gradients of keys travel with them, in float32, and go home in one step at the end."""
    plan, mask = call.plan, call.mask
    rank, group = plan.ring_rank, plan.axes.ring
    bulk = kernels.bulk(q, v, call)
    dq = Sum(q, once=mask.merges_once(mask.ring_order, bulk))
    own_dk, own_dv = Sum(k), Sum(v)
    own_k, own_v = k, v
    travelling = _pack(k, v) if mask.last_step else None
    carried: Exchange | None = None
    for step, source in enumerate(mask.ring_order):
        moving = None
        if step < mask.last_step:
            assert travelling is not None
            moving = Exchange(travelling, rank + 1, rank - 1, group)
        dk, dv = (Sum(k), Sum(v)) if step else (own_dk, own_dv)
        for tile in mask.tiles(source, bulk):
            kernels.backward(dout, q, k, v, out, lse, tile, call, dq, dk, dv)
        if step:
            flat = _pack(dk.result(), dv.result(), accumulator_dtype(k.dtype))
            if carried is not None:
                flat += carried.wait()
            to = rank + 1 if step < mask.last_step else rank - step
            carried = Exchange(flat, to, 2 * rank - to, group)
        if moving is not None:
            travelling = moving.wait()
            k, v = _unpack(travelling, own_k, own_v)
    if carried is not None:
        home_dk, home_dv = _unpack(carried.wait(), own_k, own_v)
        home_dk += own_dk.result()
        home_dv += own_dv.result()
        return dq.result(), home_dk, home_dv
    return dq.result(), own_dk.result(), own_dv.result()


class Exchange:
    """A send to one ring position and a receive from another, under way from construction to `wait`."""

    def __init__(self, buffer: Tensor, to: int, source: int, group: dist.ProcessGroup | None) -> None:
        assert group is not None
        n = dist.get_world_size(group)
        self.sent = buffer
        self.received = torch.empty(buffer.shape, dtype=buffer.dtype, device=buffer.device)
        # One group call for both directions: a bare isend beside an irecv can deadlock.
        ops = [
            dist.P2POp(dist.isend, buffer, group=group, group_peer=to % n),
            dist.P2POp(dist.irecv, self.received, group=group, group_peer=source % n),
        ]
        self.works = dist.batch_isend_irecv(ops)

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _pack(k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Keys and values in one flat buffer: one message a step."""
    flat = torch.empty(k.numel() + v.numel(), dtype=dtype or k.dtype, device=k.device)
    flat[: k.numel()].view(k.shape).copy_(k)
    flat[k.numel() :].view(v.shape).copy_(v)
    return flat


def _unpack(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)
