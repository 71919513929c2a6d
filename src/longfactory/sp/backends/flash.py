"""PyTorch's own FlashAttention 2 operators: any GPU since A100, documents, windows, head dims up to
256. No build step.

Head dims are padded to one multiple of 8 for keys and values alike. The operator marks a row that
saw nothing with lse +inf; here it is -inf, as in every other backend.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..tiles import Tile
from . import operators
from .padding import cut_head, pad_head
from .request import Request


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    if request.device_type != "cuda":
        return "runs on GPUs"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if max(request.head_dim, request.v_head_dim) > 256:
        return "needs head dims up to 256"
    if request.softcap:
        return "has no soft-cap"
    if torch.cuda.get_device_capability()[0] < 8:
        return "needs an Ampere GPU or newer"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    dim = v.shape[-1]
    q, k, v = _padded(q, k, v)
    cu = tile.cu_seqlens_on(q.device) if tile.kind == "varlen" else None
    if cu is None:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse, *_ = operators.forward(
        "_flash_attention",
        query=q,
        key=k,
        value=v,
        return_debug_mask=False,
        **_mask(tile, cu),
        scale=scale,
    )
    if cu is None:
        out, lse = out[0], lse[0]
    return cut_head(out, dim), torch.where(lse == math.inf, -math.inf, lse)


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
    dims = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, out, dout = _padded(q, k, v, out, dout)
    lse = torch.where(lse == -math.inf, math.inf, lse).contiguous()
    out, dout = out.contiguous(), dout.contiguous()
    cu = tile.cu_seqlens_on(q.device) if tile.kind == "varlen" else None
    if cu is None:
        dout, q, k, v, out, lse = (x.unsqueeze(0) for x in (dout, q, k, v, out, lse))
    # Without dropout these two are never read, but the operator wants them.
    rng = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    grads = operators.backward(
        "_flash_attention",
        grad_out=dout,
        query=q,
        key=k,
        value=v,
        out=out,
        logsumexp=lse,
        rng_state=rng,
        unused=unused,
        **_mask(tile, cu),
        scale=scale,
    )
    dq, dk, dv = (
        cut_head(g if cu is not None else g[0], d) for g, d in zip(grads, dims, strict=True)
    )
    return dq, dk, dv


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    widest = max(x.shape[-1] for x in tensors)
    return tuple(pad_head(x, 8, widest) for x in tensors)


def _mask(tile: Tile, cu: Tensor | None) -> dict[str, Any]:
    """The operator's lengths and mask. `cu`: where documents begin, of a tile of several."""
    varlen = tile.kind == "varlen"
    return {
        "cum_seq_q": cu,
        "cum_seq_k": cu,
        "max_q": tile.max_seqlen if varlen else tile.q_len,
        "max_k": tile.max_seqlen if varlen else tile.k_len,
        "dropout_p": 0.0,
        "is_causal": tile.kind != "full",
        "window_size_left": -1 if tile.window is None else tile.window,
        "window_size_right": _right(tile),
    }


def _right(tile: Tile) -> int:
    # Causal with a window is the local window (left, 0); a rectangle has no right bound.
    return 0 if tile.window is not None and tile.kind != "full" else -1
