"""flash-attn-4 (extra `fa4`): the fastest kernels on Hopper and Blackwell, with documents, windows
and soft-cap.

Its public function hides the log-sum-exp's gradient rule and its tuple grows between releases, so
the two private functions are called, indexed [:2] and [:3]. Lengths go in as Python integers: a
tensor there would compile a new kernel every step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..tiles import Tile
from .padding import cut_head, pad_head
from .request import Request


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    if request.device_type != "cuda":
        return "runs on GPUs"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    major = torch.cuda.get_device_capability()[0]
    if major not in (9, 10):
        return "needs a Hopper or Blackwell GPU"
    most = 256 if major == 9 else 128
    if max(request.head_dim, request.v_head_dim) > most:
        return f"needs head dims up to {most} on this GPU"
    return _unusable()


@functools.cache
def _interface() -> Any:
    import flash_attn.cute.interface as interface

    return interface


@functools.cache
def _unusable() -> str | None:
    try:
        _interface()
    except ImportError:
        return "is not installed (pip install 'longfactory[fa4]')"
    except Exception as error:  # an alpha release may fail in any way while it is imported
        return f"cannot be imported ({error!r})"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    dim = v.shape[-1]
    q, k, v = pad_head(q), pad_head(k), pad_head(v)
    dense = tile.kind != "varlen"
    if dense:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse = _interface()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, softcap=softcap, return_lse=True, **_mask(tile, q.device)
    )[:2]
    return cut_head(out[0] if dense else out, dim), lse[0] if dense else lse


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
    tensors: tuple[Tensor, ...] = tuple(pad_head(x) for x in (q, k, v, out, dout))
    tensors = (*tensors, lse.contiguous())
    dense = tile.kind != "varlen"
    if dense:
        tensors = tuple(x.unsqueeze(0) for x in tensors)
    ordered = torch.are_deterministic_algorithms_enabled()
    settings = {
        "softmax_scale": scale,
        "softcap": softcap or 0.0,
        "deterministic": ordered,
        **_mask(tile, q.device),
    }
    grads = _interface()._flash_attn_bwd(*tensors, **settings)[:3]
    dq, dk, dv = (cut_head(g[0] if dense else g, d) for g, d in zip(grads, dims, strict=True))
    return dq, dk, dv


def _mask(tile: Tile, device: torch.device) -> dict[str, Any]:
    settings: dict[str, Any] = {"causal": tile.kind != "full"}
    if tile.window is not None:
        settings["window_size_left"] = tile.window
    if tile.kind == "varlen":
        cu = tile.cu_seqlens_on(device)
        settings.update(
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=tile.max_seqlen,
            max_seqlen_k=tile.max_seqlen,
        )
    return settings
