"""One attention call: its settings, and one tile computed and added to the running results."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .merge import Output, Sum, accumulator_dtype
from .tiles import Tile

if TYPE_CHECKING:
    from .plan import MaskPlan, RowPlan


KeyGradients = Callable[[], tuple[Tensor, Tensor]]
"""Waits for dk [T/n, Hk, D] and dv [T/n, Hk, Dv], of which other ranks compute a part. It is called
once, and gives up what it holds.
"""


@dataclasses.dataclass(frozen=True)
class Call:
    """The settings of one attention call, the same for all of its tiles."""

    plan: RowPlan
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    """The output is scaled after the merge, so it is not rounded before."""
    copies: int = 1
    """How often each key head travels in an exchange of heads (schedules/ulysses.py)."""

    @functools.cached_property
    def mask(self) -> MaskPlan:
        return self.plan.mask(self.window, self.chunk)

    def key_gradients(self, dtype: torch.dtype) -> torch.dtype:
        """In which a schedule gives dk and dv of keys in `dtype`: rounded, unless copies of them
        are still to be added.
        """
        return dtype if self.copies == 1 else accumulator_dtype(dtype)


def bulk(q: Tensor, v: Tensor, call: Call) -> bool:
    """Whether large tiles are cut to few shapes: there is a faster kernel that wants that."""
    return backends.wants_bulk(call.plan.ctx.backend, q, v, call.softcap)


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """[S, H, D] -> [len(rows), H, D]: rows of a tile; those beyond the tensor's end are zeros."""
    missing = rows.stop - x.shape[0]
    return x[rows] if missing <= 0 else F.pad(x[rows], (0, 0, 0, 0, 0, missing))


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, call: Call, total: Output) -> None:
    """Computes one tile of this rank's queries and keys, and adds it to the running output."""
    q, k, v = rows_of(q, tile.q), rows_of(k, tile.k), rows_of(v, tile.k)
    backend = backends.select(call.plan.ctx.backend, tile, q, v, call.softcap)
    out, lse = backend.forward(q, k, v, tile, call.scale, call.softcap)
    if tile.valid is not None:
        out, lse = out[tile.valid], lse[:, tile.valid]
    total.add(tile.rows, out, lse, tile.first)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    call: Call,
    dq: Sum,
    dk: Sum,
    dv: Sum,
) -> None:
    """Computes the gradients of one tile, and adds them to the running sums."""
    q, k, v = rows_of(q, tile.q), rows_of(k, tile.k), rows_of(v, tile.k)
    backend = backends.select(call.plan.ctx.backend, tile, q, v, call.softcap)
    if tile.valid is None:
        lse = lse[:, tile.q]
    else:  # the other queries have no probability, so they add nothing to any gradient
        valid = lse[:, tile.rows]
        lse = lse.new_full((lse.shape[0], tile.q_len), math.inf)
        lse[:, tile.valid] = valid
    dout, out = rows_of(dout, tile.q), rows_of(out, tile.q)
    grads = backend.backward(dout, q, k, v, out, lse, tile, call.scale, call.softcap)
    # A first tile is a square of the same queries and keys; those beyond `valid` have no gradient
    # of it.
    keys = slice(None) if tile.valid is None or not tile.first else tile.valid
    dq.add(tile.rows, grads[0] if tile.valid is None else grads[0][tile.valid], tile.first)
    dk.add(tile.rows if tile.first else tile.k, grads[1][keys], tile.first)
    dv.add(tile.rows if tile.first else tile.k, grads[2][keys], tile.first)
