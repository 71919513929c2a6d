"""One attention call: its settings, and one tile computed and added to the running results."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from torch import Tensor

from . import backends
from .merge import Output, Sum
from .tiles import Tile

if TYPE_CHECKING:
    from .plan import MaskPlan, RowPlan


@dataclasses.dataclass(frozen=True)
class Call:
    plan: RowPlan
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    """The output is scaled after the merge, so it is not rounded before."""

    @functools.cached_property
    def mask(self) -> MaskPlan:
        return self.plan.mask(self.window, self.chunk)


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, call: Call, total: Output) -> None:
    q, k, v = q[tile.q], k[tile.k], v[tile.k]
    backend = backends.select(call.plan.ctx.backend, tile, q, v, call.softcap)
    out, lse = backend.forward(q, k, v, tile, call.scale, call.softcap)
    total.add(tile.q, out, lse)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, call: Call, dq: Sum, dk: Sum, dv: Sum
) -> None:
    q, k, v = q[tile.q], k[tile.k], v[tile.k]
    backend = backends.select(call.plan.ctx.backend, tile, q, v, call.softcap)
    grads = backend.backward(dout[tile.q], q, k, v, out[tile.q], lse[:, tile.q], tile, call.scale, call.softcap)
    dq.add(tile.q, grads[0])
    dk.add(tile.k, grads[1])
    dv.add(tile.k, grads[2])
