"""PyTorch's CPU attention operator: float64, float32, bfloat16 and float16, native grouped heads,
exact log-sum-exp.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..tiles import Tile
from . import by_document, operators
from .request import Request


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    if request.device_type != "cpu":
        return "runs on CPUs"
    if request.head_dim != request.v_head_dim:
        return "needs equal head dims of keys and values"
    if request.softcap:
        return "has no soft-cap"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    if tile.kind == "varlen":
        return by_document.forward(forward, q, k, v, tile, scale, softcap)
    out, lse = operators.forward(
        "_scaled_dot_product_flash_attention_for_cpu",
        query=_bhsd(q),
        key=_bhsd(k),
        value=_bhsd(v),
        dropout_p=0.0,
        is_causal=_causal(tile),
        attn_mask=_additive(tile, q.dtype),
        scale=scale,
    )
    return out[0].transpose(0, 1), lse[0]


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
    if tile.kind == "varlen":
        return by_document.backward(backward, dout, q, k, v, out, lse, tile, scale, softcap)
    grads = operators.backward(
        "_scaled_dot_product_flash_attention_for_cpu",
        grad_out=_bhsd(dout),
        query=_bhsd(q),
        key=_bhsd(k),
        value=_bhsd(v),
        out=_bhsd(out),
        logsumexp=lse.unsqueeze(0),
        dropout_p=0.0,
        is_causal=_causal(tile),
        attn_mask=_additive(tile, q.dtype),
        scale=scale,
    )
    dq, dk, dv = (g[0].transpose(0, 1) for g in grads)
    return dq, dk, dv


def _bhsd(x: Tensor) -> Tensor:
    # [S, H, D] -> [1, H, S, D]
    return x.transpose(0, 1).unsqueeze(0)


def _causal(tile: Tile) -> bool:
    return tile.kind == "causal" and tile.window is None


def _additive(tile: Tile, dtype: torch.dtype) -> Tensor | None:
    if tile.window is None:
        return None
    return _window_mask(tile.q_len, tile.k_len, tile.kind, tile.window, dtype)


@functools.lru_cache(maxsize=16)  # the same few shapes come again in every layer
def _window_mask(q_len: int, k_len: int, kind: str, window: int, dtype: torch.dtype) -> Tensor:
    seen = Tile(slice(0, q_len), slice(0, k_len), kind, window=window).mask()  # type: ignore[arg-type]
    return torch.zeros(q_len, k_len, dtype=dtype).masked_fill_(~seen, -math.inf)
