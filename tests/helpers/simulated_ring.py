"""The zigzag ring of n ranks, block by block in one process: the same tiles and the same merge,
without messages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longfactory import sp
from longfactory.sp import kernels
from longfactory.sp.kernels import Call
from longfactory.sp.merge import Output, Sum


def simulated_ring(
    ranks: int, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, backend: str = "auto"
) -> list[Tensor]:
    """out, dq, dk, dv of causal attention, rounded to the inputs' dtype at the end as each rank
    would.
    """
    device = q.device.type
    plans = [
        sp.plan(
            q.shape[0], None, sp.SequenceParallel(ranks, r, backend=backend, device_type=device)
        )
        for r in range(ranks)
    ]
    rows = [p.index.to(q.device) for p in plans]
    parts = [[x[r] for r in rows] for x in (q, k, v, dout)]
    results = [torch.empty_like(x) for x in (dout, q, k, v)]
    dk = [Sum(x) for x in parts[1]]
    dv = [Sum(x) for x in parts[2]]
    scale = q.shape[-1] ** -0.5
    for rank, plan in enumerate(plans):
        call = Call(plan, scale)
        total, dq = Output(plan.local_length), Sum(parts[0][rank])
        order = [(rank - step) % ranks for step in range(ranks)]
        for source in order:
            for tile in call.mask.tiles(source):
                kernels.forward(
                    parts[0][rank], parts[1][source], parts[2][source], tile, call, total
                )
        assert total.out is not None and total.lse is not None
        out = total.out.to(q.dtype)
        for source in order:
            held = (
                parts[3][rank],
                parts[0][rank],
                parts[1][source],
                parts[2][source],
                out,
                total.lse,
            )
            for tile in call.mask.tiles(source):
                kernels.backward(*held, tile, call, dq, dk[source], dv[source])
        results[0][rows[rank]] = out
        results[1][rows[rank]] = dq.result().to(q.dtype)
    for rank in range(ranks):
        results[2][rows[rank]] = dk[rank].result().to(q.dtype)
        results[3][rows[rank]] = dv[rank].result().to(q.dtype)
    return results


def relative_rms(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, exact, strict=True)
    ]
