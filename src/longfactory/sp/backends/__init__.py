"""Attention kernels for one tile, behind one contract.

    refuses(request) -> str | None        the reason why it cannot do this tile, None if it can
    forward(q, k, v, tile, scale, softcap) -> out, lse
    backward(dout, q, k, v, out, lse, tile, scale, softcap) -> dq, dk, dv

q [Sq, H, D], k [Sk, Hk, D], v [Sk, Hk, Dv] hold just the rows of the tile; H is a multiple of Hk. out [Sq, H, Dv] has q's dtype. lse
[H, Sq] is the natural logarithm in float32 (float64 for float64), -inf for a row that sees nothing. `backward` is given the out and
the lse of the whole row of the mask, of which the tile is a part, so its gradients are the tile's exact share.
A backend raises or refuses what it cannot do; it never approximates.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from ..tiles import Tile
from . import cpu, math
from .request import Request

log = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "math": math}
"""In order of preference."""


def select(name: str, tile: Tile, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> ModuleType:
    """The backend for a tile. `name` is a backend's name or "auto".

    Raises:
        ValueError: no backend can do it, or the one that was asked for cannot.
    """
    aligned = tile.q_len % 128 == 0 and tile.k_len % 128 == 0
    request = Request(q.device.type, q.dtype, q.shape[-1], v.shape[-1], tile.kind, tile.window is not None, softcap is not None, aligned)
    return _select(name, request)


@functools.cache
def _select(name: str, request: Request) -> ModuleType:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Unknown attention_backend {name!r}. Choose one of: auto, {', '.join(BACKENDS)}.")
    refusals: list[str] = []
    for candidate in BACKENDS if name == "auto" else [name]:
        reason = BACKENDS[candidate].refuses(request)
        if reason is None:
            log.info("attention backend %s for %s%s", candidate, request, f" ({'; '.join(refusals)})" if refusals else "")
            return BACKENDS[candidate]
        refusals.append(f"{candidate} {reason}")
    raise ValueError(f"No attention backend for {request}: {'; '.join(refusals)}.")
