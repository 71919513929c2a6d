"""Each rank fetches, once, the keys and values that its queries see; gradients go back the same
way, in float32.

The all-gather scheme of Llama 3 (Dubey et al., 2024, section 3.3.2), but only needed rows travel:
of a packed row the documents that begin before a chunk, of a sliding-window layer the window. The
fetch is under way while the rank computes its own rows' tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .. import kernels
from ..kernels import Call, KeyGradients
from ..merge import Output, Sum, accumulator_dtype
from ..plan import HALO


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """out (in the dtype in which it was accumulated) and lse."""
    mask = call.mask
    bulk = kernels.bulk(q, v, call)
    total = Output(q.shape[0], once=mask.merges_once((mask.rank, HALO), bulk) and not call.sinks)
    fetch = Fetch(k, v, call)
    for tile in mask.tiles(mask.rank, bulk):
        kernels.forward(q, k, v, tile, call, total)
    if fetch.posted:
        k, v = fetch.wait()
        for tile in mask.tiles(HALO, bulk):
            kernels.forward(q, k, v, tile, call, total)
    assert total.out is not None and total.lse is not None
    return total.out, total.lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, KeyGradients]:
    """dq as accumulated, and a function that waits for dk and dv, in `call.key_gradients`: those of
    fetched rows are under way when this returns.
    """
    mask = call.mask
    bulk = kernels.bulk(q, v, call)
    dq = Sum(q, once=mask.merges_once((mask.rank, HALO), bulk))
    fetch = Fetch(k, v, call)
    once = not fetch.posted and mask.writes_once(mask.rank, bulk)
    dk, dv, arrived = Sum(k, once), Sum(v, once), None
    for tile in mask.tiles(mask.rank, bulk):
        kernels.backward(dout, q, k, v, out, lse, tile, call, dq, dk, dv)
    if fetch.posted:
        far_k, far_v = fetch.wait()
        far_dk, far_dv = Sum(far_k), Sum(far_v)
        for tile in mask.tiles(HALO, bulk):
            kernels.backward(dout, q, far_k, far_v, out, lse, tile, call, dq, far_dk, far_dv)
        arrived = fetch.give_back(far_dk.result(), far_dv.result())
    dtype = call.key_gradients(k.dtype)
    left = [(dk, dv, arrived)]  # the call takes them away

    def of_keys() -> tuple[Tensor, Tensor]:
        dk, dv, arrived = left.pop()
        for index, rows_k, rows_v in () if arrived is None else arrived():
            dk.add_rows(index, rows_k)
            dv.add_rows(index, rows_v)
        return dk.result().to(dtype), dv.result().to(dtype)

    return dq.result(), of_keys


Rows = tuple[Tensor, Tensor, Tensor]
"""Local rows, their dk and their dv."""


class Fetch:
    """The exchange of needed rows, under way from construction to `wait`. Not `posted` where no
    rank needs any.
    """

    def __init__(self, k: Tensor, v: Tensor, call: Call) -> None:
        self.k, self.v = k, v
        self.halo = call.mask.halo
        self.group = call.plan.axes.ring
        self.posted = self.halo.anyone
        if not self.posted:
            return
        self.send_index, self.order = call.mask.halo_index(k.device)
        widths = k[0].numel(), v[0].numel()
        self.sent = torch.empty((len(self.send_index), sum(widths)), dtype=k.dtype, device=k.device)
        for x, part in zip((k, v), self.sent.split(widths, 1), strict=True):
            torch.index_select(x.flatten(1), 0, self.send_index, out=part)
        self.received = _rows(sum(self.halo.receive_counts), self.sent)
        self.work = _all_to_all(
            self.received, self.sent, self.halo.receive_counts, self.halo.send_counts, self.group
        )

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the fetched rows in natural order."""
        self.work.wait()
        width = self.k.shape[1] * self.k.shape[2]
        k = self.received[:, :width].index_select(0, self.order).unflatten(1, self.k.shape[1:])
        v = self.received[:, width:].index_select(0, self.order).unflatten(1, self.v.shape[1:])
        return k, v

    def give_back(self, dk: Tensor, dv: Tensor) -> Callable[[], list[Rows]]:
        """Gradients of fetched rows to their owners, under way when this returns.

        Returns:
            A function that waits for those of this rank's rows: for each rank that used some.
        """
        width = self.k.shape[1] * self.k.shape[2]
        sent = torch.empty(
            self.received.shape, dtype=accumulator_dtype(self.k.dtype), device=self.k.device
        )
        sent[:, :width].index_copy_(0, self.order, dk.flatten(1).to(sent.dtype))
        sent[:, width:].index_copy_(0, self.order, dv.flatten(1).to(sent.dtype))
        received = _rows(sum(self.halo.send_counts), sent)
        work = _all_to_all(
            received, sent, self.halo.send_counts, self.halo.receive_counts, self.group
        )

        def arrived() -> list[Rows]:
            work.wait()
            out, at = [], 0
            for count in self.halo.send_counts:
                if count:
                    part = received[at : at + count]
                    index = self.send_index[at : at + count]
                    out.append(
                        (
                            index,
                            part[:, :width].unflatten(1, self.k.shape[1:]),
                            part[:, width:].unflatten(1, self.v.shape[1:]),
                        )
                    )
                at += count
            return out

        return arrived


def _rows(count: int, like: Tensor) -> Tensor:
    return torch.empty((count, like.shape[1]), dtype=like.dtype, device=like.device)


def _all_to_all(
    out: Tensor,
    x: Tensor,
    out_counts: tuple[int, ...],
    counts: tuple[int, ...],
    group: dist.ProcessGroup | None,
) -> dist.Work:
    work = dist.all_to_all_single(
        out, x, list(out_counts), list(counts), group=group, async_op=True
    )
    assert work is not None
    return work
