"""Attention kernels for one tile, behind one contract.

    refuses(request) -> str | None        the reason why it cannot do this tile, None if it can
    forward(q, k, v, tile, scale, softcap) -> out, lse
    backward(dout, q, k, v, out, lse, tile, scale, softcap) -> dq, dk, dv

q [Sq, H, D], k [Sk, Hk, D], v [Sk, Hk, Dv] hold just the rows of the tile; H is a multiple of Hk.
out [Sq, H, Dv] has q's dtype. lse [H, Sq] is the natural logarithm in float32 (float64 for
float64), -inf for a row that sees nothing. `backward` is given the out and the lse of the whole row
of the mask, of which the tile is a part, so its gradients are the tile's exact share. A backend
raises or refuses what it cannot do; it never approximates.

`auto` takes the first of `BACKENDS` that does not refuse a tile and passes its self-test
(selftest.py): a tiny tile of the same kind, head dims and dtype, forward and backward, against the
formulas. That is done once a process for each kind. A backend that fails is not used, and one line
says why.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from longfactory.kernel_names import KERNELS, canonical

from ..tiles import Tile
from . import cpu, cudnn, efficient, fa4, flash, math, triton_tiles
from .installed import flash2, flash3
from .request import Request
from .selftest import selftest

log = logging.getLogger(__name__)

_MODULES: dict[str, Any] = {
    "fa4": fa4,
    "flash3": flash3,
    "cudnn": cudnn,
    "flash2": flash2,
    "flash": flash,
    "triton": triton_tiles,
    "efficient": efficient,
    "cpu": cpu,
    "math": math,
}
BACKENDS: dict[str, Any] = {name: _MODULES[name] for name in KERNELS}
"""In order of preference."""


def select(name: str, tile: Tile, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> Any:
    """The backend for a tile. `name` is a backend's name, one of its other names (`kernel_names`),
    or "auto".

    A backend that is asked for by name gets every tile that it can do; the others go where "auto"
    would send them.

    Raises:
        ValueError: no backend can do it, or the one that was asked for cannot be used here at all.
    """
    return _select(canonical(name), request_for(tile, q, v, softcap))


def request_for(tile: Tile, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> Request:
    """What the tile needs of a kernel."""
    large = q.numel() >= 2**31
    return Request(
        q.device.type,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        tile.kind,
        tile.window is not None,
        softcap is not None,
        aligned=tile.q_len % 128 == 0 and tile.k_len % 128 == 0 and not large,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        large=large,
        group=max(1, q.shape[1] // max(1, v.shape[1])),
    )


def wants_bulk(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> bool:
    """Whether tiles of packed documents should be cut to few shapes: cuDNN does those, and only
    FlashAttention 2 the others.
    """
    if q.device.type != "cuda":
        return False
    documents = request_for(Tile(slice(0, 1), slice(0, 1), "varlen", (0, 1)), q, v, softcap)
    return cuts_documents(canonical(name), documents)


def cuts_documents(name: str, request: Request) -> bool:
    """Whether long documents of a row leave the call that has several documents, for calls of their
    own.

    Args:
        request: for several documents.
    """
    if request.device_type != "cuda" or request.window:
        return False
    documents = request._replace(kind="varlen", aligned=False, large=False)
    one = request._replace(kind="causal", aligned=True, large=False)
    chosen = resolve(name, one)[0], resolve(name, documents)[0]
    return chosen[0] == "cudnn" and chosen[1] in ("flash", "flash2")


_told: set[tuple[str, str, bool]] = set()


def mark_told(name: str, request: Request) -> bool:
    """Whether this kernel was not named for this kind of tile before; afterwards it was."""
    key = (name, request.kind, request.window)
    new = key not in _told
    _told.add(key)
    return new


def failure(name: str, request: Request) -> str | None:
    """What the self-test of this kind of tile says, once a process. None for `math`, with which the
    others are compared.
    """
    if name == "math":
        return None
    # Size is no other kind of tile, and shapes that come again matter to GPUs alone.
    return _failure(
        name,
        request._replace(large=False, aligned=request.aligned and request.device_type == "cuda"),
    )


@functools.cache
def _failure(name: str, request: Request) -> str | None:
    reason = selftest(BACKENDS[name], request)
    if reason is not None:
        log.warning("attention_backend %s is not used: it %s.", name, reason)
    return reason


@functools.cache
def resolve(name: str, request: Request) -> tuple[str, dict[str, str]]:
    """The name of the backend for this kind of tile, and why each one before it is not used.

    Raises:
        ValueError: no backend can do it, or the one that was asked for cannot be used here at all.
    """
    refusals: dict[str, str] = {}
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(
                f"Unknown attention_backend {name!r}. Choose one of: auto, {', '.join(BACKENDS)}."
            )
        easiest = Request(request.device_type, request.dtype, 64, 64, "full", False, False, True)
        reason = BACKENDS[name].refuses(easiest)
        if reason is None and BACKENDS[name].refuses(request) is None:
            reason = failure(name, request)
            if reason is None:
                return name, {}
        if reason is not None:
            raise ValueError(f"attention_backend: {name} {reason}. Use attention_backend: auto.")
        refusals[name] = BACKENDS[name].refuses(request)
    for candidate, backend in BACKENDS.items():
        reason = backend.refuses(request) or failure(candidate, request)
        if reason is None:
            return candidate, refusals
        refusals[candidate] = reason
    raise ValueError(
        f"No attention backend for {request}: {'; '.join(f'{n} {r}' for n, r in refusals.items())}."
    )


@functools.cache
def _select(name: str, request: Request) -> Any:
    chosen, refusals = resolve(name, request)
    if mark_told(chosen, request):
        tiles = (
            f"{request.kind} tiles{' in a window' if request.window else ''}, {request.dtype}, head"
            f" dim {request.head_dim}"
        )
        why = f" ({name} {refusals[name]})" if name in refusals else ""
        log.info("attention kernel %s for %s%s", chosen, tiles, why)
    return BACKENDS[chosen]


def forget_choices() -> None:
    """Every backend is chosen and self-tested again. For tests."""
    _failure.cache_clear()
    resolve.cache_clear()
    _select.cache_clear()
    _told.clear()
