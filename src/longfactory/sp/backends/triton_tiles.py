"""The engine's own kernels in Triton (`tile_calls`): what no other kernel of a plain installation
computes in 16 bits, a soft-cap above all (Gemma 2).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..tiles import Tile
from .request import Request


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.device_type != "cuda" and not interpreted:
        return "runs on GPUs"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if max(request.head_dim, request.v_head_dim) > 256:
        return "needs head dims up to 256"
    if not interpreted and torch.cuda.get_device_capability()[0] < 8:
        return "needs an Ampere GPU or newer"
    return None if _installed() else "needs Triton, which is not installed"


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _calls() -> Any:
    from . import tile_calls

    return tile_calls


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    return _calls().forward(q, k, v, tile, scale, softcap)  # type: ignore[no-any-return]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a tile, from the out and lse of the whole row; see `backends`."""
    return _calls().backward(  # type: ignore[no-any-return]
        dout, q, k, v, out, lse, tile, scale, softcap
    )
