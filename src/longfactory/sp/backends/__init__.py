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
from typing import Any

import torch

from ..tiles import Tile
from . import cpu, cudnn, fa4, flash, math
from .installed import flash2, flash3
from .request import Request

log = logging.getLogger(__name__)

BACKENDS: dict[str, Any] = {
    "fa4": fa4,
    "flash3": flash3,
    "cudnn": cudnn,
    "flash2": flash2,
    "flash": flash,
    "cpu": cpu,
    "math": math,
}
"""In order of preference."""


def select(name: str, tile: Tile, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> Any:
    """The backend for a tile. `name` is a backend's name or "auto".

    A backend that is asked for by name gets every tile that it can do; the others go where "auto" would send them.

    Raises:
        ValueError: no backend can do it, or the one that was asked for cannot be used here at all.
    """
    # Kernels with 32-bit offsets stop at 2^31 elements.
    aligned = tile.q_len % 128 == 0 and tile.k_len % 128 == 0 and q.numel() < 2**31
    request = Request(
        q.device.type,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        tile.kind,
        tile.window is not None,
        softcap is not None,
        aligned,
        torch.are_deterministic_algorithms_enabled(),
    )
    return _select(name, request)


def wants_bulk(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> bool:
    """Whether tiles of packed documents should be cut to few shapes: cuDNN does those, and only FlashAttention 2 the others."""
    if q.device.type != "cuda":
        return False
    any_shape = Request(q.device.type, q.dtype, q.shape[-1], v.shape[-1], "varlen", False, softcap is not None, False)
    any_shape = any_shape._replace(deterministic=torch.are_deterministic_algorithms_enabled())
    few_shapes = any_shape._replace(kind="causal", aligned=True)
    return _select(name, few_shapes) is cudnn and _select(name, any_shape) in (flash, flash2)


_told: set[tuple[str, str, bool]] = set()


def _tell(name: str, request: Request, refusals: tuple[str, ...]) -> None:
    """One line for each backend and kind of tile, with the reasons against those before it."""
    key = (name, request.kind, request.window)
    if key in _told:
        return
    _told.add(key)
    tiles = f"{request.kind} tiles{' in a window' if request.window else ''}, {request.dtype}, head dim {request.head_dim}"
    log.info("attention backend %s for %s%s", name, tiles, f" ({'; '.join(refusals)})" if refusals else "")


@functools.cache
def _select(name: str, request: Request) -> Any:
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"Unknown attention_backend {name!r}. Choose one of: auto, {', '.join(BACKENDS)}.")
        easiest = Request(request.device_type, request.dtype, 64, 64, "full", False, False, True)
        reason = BACKENDS[name].refuses(easiest)
        if reason is not None:
            raise ValueError(f"attention_backend: {name} {reason}. Use attention_backend: auto.")
        reason = BACKENDS[name].refuses(request)
        if reason is None:
            return BACKENDS[name]
        log.warning("attention_backend %s %s: another one does these tiles (%s)", name, reason, request)
    refusals: list[str] = []
    for candidate, backend in BACKENDS.items():
        reason = backend.refuses(request)
        if reason is None:
            _tell(candidate, request, tuple(refusals))
            return backend
        refusals.append(f"{candidate} {reason}")
    raise ValueError(f"No attention backend for {request}: {'; '.join(refusals)}.")
