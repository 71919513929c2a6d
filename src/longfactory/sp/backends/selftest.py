"""A backend made of another project's private functions is compared with plain attention before its first use."""

from __future__ import annotations

from typing import Any

import torch

from ..tiles import Tile
from . import math as plain

TILES = (
    Tile(slice(0, 256), slice(0, 256), "causal"),
    Tile(slice(0, 128), slice(0, 256), "full"),
    Tile(slice(0, 256), slice(0, 256), "varlen", (0, 100, 256)),
    Tile(slice(0, 256), slice(0, 256), "causal", window=50),
)


@torch.no_grad()
def selftest(backend: Any, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> str | None:
    """None if it agrees within what bfloat16 allows, else what went wrong. The backward gets another tile's out and lse: a share."""
    g = torch.Generator().manual_seed(0)
    for tile in TILES:
        q, dout = (torch.randn(tile.q_len, 4, 64, generator=g).to(device, dtype) for _ in range(2))
        k, v = (torch.randn(tile.k_len, 2, 64, generator=g).to(device, dtype) for _ in range(2))
        try:
            out, lse = backend.forward(q, k, v, tile, 0.125, None)
            whole = lse.float() + 0.5
            found = (out, *backend.backward(dout, q, k, v, out, whole, tile, 0.125, None))
        except Exception as error:
            return f"fails its self-test ({type(error).__name__}: {error})"
        wide = [x.float() for x in (q, k, v)]
        exact_out, exact_lse = plain.forward(wide[0], wide[1], wide[2], tile, 0.125, None)
        exact = (exact_out, *plain.backward(dout.float(), wide[0], wide[1], wide[2], out.float(), whole, tile, 0.125, None))
        if not torch.allclose(lse, exact_lse, rtol=0, atol=1e-2):
            return f"fails its self-test (log-sum-exp of a {tile.kind} tile)"
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
            relative = ((a.float() - b).norm() / b.norm()).item()
            if not relative <= 2e-2:
                return f"fails its self-test ({name} of a {tile.kind} tile is off by {relative:.1e})"
    return None
