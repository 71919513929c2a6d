"""Before a backend computes its first tile of a kind, it computes a tiny one, forward and backward,
and is compared with the formulas.
"""

from __future__ import annotations

from typing import Any

import torch

from ..tiles import Tile
from . import math as plain
from .request import Request

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest relative error of out, dq, dk and dv. What the formats themselves allow, several times
over; a wrong mask, scale or head is off by 0.1 and more. A kernel that rounds float32 to 10 bits of
mantissa (TF32) is off by 5e-4, and is refused for float32."""


def tile_for(request: Request) -> Tile:
    """A tiny tile of the kind that is asked for; smaller on a CPU, whose kernels have no large
    blocks of their own.
    """
    rows = 256 if request.aligned else 201
    if request.device_type == "cpu":
        rows = 61
    window = rows // 4 if request.window else None
    square = slice(0, rows)
    if request.kind == "full":
        return Tile(slice(0, rows // 2), square, "full", window=window)
    if request.kind == "varlen":
        return Tile(square, square, "varlen", (0, 1, rows // 3, rows), window)
    return Tile(square, square, "causal", window=window)


@torch.no_grad()
def selftest(backend: Any, request: Request) -> str | None:
    """None if the backend agrees within TOLERANCE, else what went wrong. The backward gets another
    tile's out and lse: a share.

    The formulas are computed in float64 on the same device, for two key heads and as many query
    heads to each as the request says.
    """
    device, dtype = request.device_type, request.dtype
    tile = tile_for(request)
    softcap = 20.0 if request.softcap else None
    scale = request.head_dim**-0.5
    g = torch.Generator().manual_seed(0)

    def random(rows: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(rows, heads, dim, generator=g).to(device, dtype)

    heads = 2 * request.group
    q, dout = (
        random(tile.q_len, heads, request.head_dim),
        random(tile.q_len, heads, request.v_head_dim),
    )
    k, v = random(tile.k_len, 2, request.head_dim), random(tile.k_len, 2, request.v_head_dim)
    try:
        out, lse = backend.forward(q, k, v, tile, scale, softcap)
        whole, whole_out = lse + 0.5, out * 0.5  # some of the probability lies outside of this tile
        found = (out, *backend.backward(dout, q, k, v, whole_out, whole, tile, scale, softcap))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"fails its self-test ({type(error).__name__}: {_first_line(error)})"
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = plain.forward(wide[0], wide[1], wide[2], tile, scale, softcap)
    grads = plain.backward(
        dout.double(),
        wide[0],
        wide[1],
        wide[2],
        whole_out.double(),
        exact_lse + 0.5,
        tile,
        scale,
        softcap,
    )
    what = (
        f"a {request.kind} tile{' in a window' if request.window else ''}, head dim"
        f" {request.head_dim}, {dtype}"
    )
    if lse.shape != exact_lse.shape or not torch.allclose(
        lse.double(), exact_lse, rtol=0, atol=1e-2
    ):
        return f"fails its self-test (log-sum-exp of {what})"
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, (exact_out, *grads), strict=True):
        if a.shape != b.shape:
            return (
                f"fails its self-test ({name} of {what} has shape {tuple(a.shape)}, expected"
                f" {tuple(b.shape)})"
            )
        relative = ((a.double() - b).norm() / b.norm()).item()
        if not relative <= TOLERANCE[dtype]:  # also NaN
            return (
                f"fails its self-test ({name} of {what} is off by {relative:.1e}, tolerated are"
                f" {TOLERANCE[dtype]:.0e})"
            )
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
