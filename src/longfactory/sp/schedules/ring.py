"""Keys and values go round a ring; each rank computes its tiles against what passes. Liu et al.,
Ring Attention, 2023.

Zigzag chunks make the work of a causal document equal on every rank and at every step.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kernels
from ..kernels import Call, KeyGradients
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
            # under way while this step computes
            moving = Exchange(travelling, rank + 1, rank - 1, group)
        for tile in mask.tiles(source, bulk):
            kernels.forward(q, k, v, tile, call, total)
        if moving is not None:
            travelling = moving.wait()
            k, v = _unpack(travelling, k, v)
    assert total.out is not None and total.lse is not None
    return total.out, total.lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, KeyGradients]:
    """dq as accumulated, and a function that waits for dk and dv, in `call.key_gradients`.
    Gradients of keys travel with them, in float32, and go home in one step at the end, under way
    when this returns.
    """
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
        arriving, dk, dv = None, own_dk, own_dv
        if step:
            arriving = Arriving(own_k, own_v, carried)
            dk, dv = Sum(own_k, memory=arriving.dk), Sum(own_v, memory=arriving.dv)
        for tile in mask.tiles(source, bulk):
            kernels.backward(dout, q, k, v, out, lse, tile, call, dq, dk, dv)
        if arriving is not None:
            # Where this rank had nothing to add: what arrived, or zeros.
            dk.result()
            dv.result()
            to = rank + 1 if step < mask.last_step else rank - step
            carried = Exchange(arriving.buffer, to, 2 * rank - to, group)
        if moving is not None:
            travelling = moving.wait()
            k, v = _unpack(travelling, own_k, own_v)
    dtype = call.key_gradients(k.dtype)
    left = [((own_dk.result(), own_dv.result()), carried)]  # the call takes them away

    def of_keys() -> tuple[Tensor, Tensor]:
        own, carried = left.pop()
        if carried is None:
            return own[0].to(dtype), own[1].to(dtype)
        # Added and rounded in one pass over memory.
        home = _unpack(carried.wait(), *own)
        rounded = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in home)
        dk, dv = (torch.add(a, b, out=c) for a, b, c in zip(home, own, rounded, strict=True))
        return dk, dv

    return dq.result(), of_keys


class Arriving:
    """The buffer in which sums of dk and dv travel: what arrives of the ranks before, for this rank
    to add to; new where none was before.

    It is waited for when there is something to add: until then the tile's kernel runs. It does not
    know the sums that are made in it: in a circle of references a whole layer's gradients would
    stay until Python looks for such circles.
    """

    def __init__(self, k: Tensor, v: Tensor, carried: Exchange | None) -> None:
        self.k, self.v, self.carried = k, v, carried

    @functools.cached_property
    def buffer(self) -> Tensor:
        if self.carried is not None:
            return self.carried.wait()
        return torch.empty(
            self.k.numel() + self.v.numel(),
            dtype=accumulator_dtype(self.k.dtype),
            device=self.k.device,
        )

    def dk(self) -> tuple[Tensor, bool]:
        return _unpack(self.buffer, self.k, self.v)[0], self.carried is not None

    def dv(self) -> tuple[Tensor, bool]:
        return _unpack(self.buffer, self.k, self.v)[1], self.carried is not None


class Exchange:
    """A send to one ring position and a receive from another, under way from construction to
    `wait`.
    """

    def __init__(
        self, buffer: Tensor, to: int, source: int, group: dist.ProcessGroup | None
    ) -> None:
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


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values in one flat buffer: one message a step."""
    flat = torch.empty(k.numel() + v.numel(), dtype=k.dtype, device=k.device)
    flat[: k.numel()].view(k.shape).copy_(k)
    flat[k.numel() :].view(v.shape).copy_(v)
    return flat


def _unpack(flat: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)
