"""PyTorch's memory-efficient attention operators (CUTLASS): the GPU kernel for float32, and for
head dims over 256.

Rectangles and causal squares; a tile of documents is one call a document. Key heads are repeated
for the query heads that share them, and their gradients summed: the operator has no groups in every
release. Products of float32 are made of three TF32 products each, which is float32's precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tiles import Tile
from . import by_document, operators
from .padding import cut_head, pad_head
from .request import Request

CAUSAL_FROM_TOP_LEFT = 1
ROWS = 32
"""The operator keeps the log-sum-exp of a multiple of so many rows."""


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    if request.device_type != "cuda":
        return "runs on GPUs"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "needs float32, float16 or bfloat16"
    if request.window or request.softcap:
        return "has no window and no soft-cap"
    if request.deterministic:
        return "adds gradients in any order"
    if request.large:
        return "has 32-bit offsets"
    if torch.cuda.get_device_capability()[0] < 8:
        return "needs an Ampere GPU or newer"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    if tile.kind == "varlen":
        return by_document.forward(forward, q, k, v, tile, scale, softcap)
    group, dim = q.shape[1] // k.shape[1], v.shape[-1]
    q, k, v = (
        pad_head(x) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    out, lse, *_ = operators.forward(
        "_efficient_attention",
        query=q.unsqueeze(0),
        key=k.unsqueeze(0),
        value=v.unsqueeze(0),
        bias=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=q.shape[0],
        max_seqlen_k=k.shape[0],
        dropout_p=0.0,
        custom_mask_type=_mask_type(tile),
        compute_log_sumexp=True,
        scale=scale,
    )
    return cut_head(out[0], dim), lse[0, :, : q.shape[0]].contiguous()


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
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    dims = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v = (
        pad_head(x) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    out, dout = (pad_head(x).contiguous() for x in (out, dout))
    # A row that saw nothing has no gradient: exp(score - inf) is 0. So have the rows that fill up a
    # multiple.
    lse = torch.where(lse == -math.inf, math.inf, lse)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[1] % ROWS), value=math.inf).contiguous()
    # seed and offset, never read without dropout
    empty = torch.empty((), dtype=torch.long, device=q.device)
    grads = operators.backward(
        "_efficient_attention",
        grad_out_=dout.unsqueeze(0),
        query=q.unsqueeze(0),
        key=k.unsqueeze(0),
        value=v.unsqueeze(0),
        bias=None,
        out=out.unsqueeze(0),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=q.shape[0],
        max_seqlen_k=k.shape[0],
        logsumexp=lse.unsqueeze(0),
        dropout_p=0.0,
        philox_seed=empty,
        philox_offset=empty,
        custom_mask_type=_mask_type(tile),
        bias_requires_grad=False,
        scale=scale,
    )
    dq, dk, dv = (cut_head(g[0], dim) for g, dim in zip(grads[:3], dims, strict=True))
    # [S, Hk * group, D] -> [S, Hk, group, D], copies of a key head summed in float32
    dk, dv = (
        g.unflatten(1, (kv_heads, group)).sum(2, dtype=torch.float32).to(g.dtype) for g in (dk, dv)
    )
    return dq, dk, dv


def _mask_type(tile: Tile) -> int:
    return 0 if tile.kind == "full" else CAUSAL_FROM_TOP_LEFT
