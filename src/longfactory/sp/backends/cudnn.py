"""PyTorch's cuDNN attention operators: on Hopper nearly twice the speed of FlashAttention 2, in
every PyTorch wheel.

cuDNN builds a plan for each new shape (some 50 ms), so it gets the tiles whose sides are multiples
of 128. Dense rectangles and causal squares only; its operator for several documents is slower than
one call a document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiles import Tile
from . import operators
from .request import Request

LATENT = (192, 128)
"""Head dims of latent attention (DeepSeek): cuDNN has a kernel for them on Hopper and Blackwell."""
WIDE = (256, 256)
"""Head dims of Gemma and Qwen3.5: measured on Hopper, 1.6 times the speed of FlashAttention 2
(benchmarks/results/kernels.md)."""


def refuses(request: Request) -> str | None:
    """Why this kernel cannot compute such a tile, None where it can; see `backends`."""
    if request.device_type != "cuda":
        return "runs on GPUs"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if request.kind == "varlen":
        return "is slow on packed documents"
    if request.window or request.softcap:
        return "has no window and no soft-cap"
    if request.deterministic:
        return "adds gradients in any order"
    if not request.aligned:
        return "needs sides that are multiples of 128"
    dims = request.head_dim, request.v_head_dim
    plain = dims[0] == dims[1] <= 128 and dims[0] % 8 == 0
    if not plain and dims not in (LATENT, WIDE):
        return "needs one head dim, a multiple of 8 up to 128 or 256, or 192 with values of 128"
    major = torch.cuda.get_device_capability()[0]
    if major not in (9, 10):
        return "is fast on Hopper and Blackwell only"
    if dims == WIDE and major != 9:
        return "was measured with heads of 256 on Hopper only"
    if not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < 91000:
        return f"needs cuDNN 9.10 (found {torch.backends.cudnn.version()})"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    out, lse, *_ = operators.forward(
        "_scaled_dot_product_cudnn_attention",
        query=_bhsd(q),
        key=_bhsd(k),
        value=_bhsd(v),
        attn_bias=None,
        compute_log_sumexp=True,
        dropout_p=0.0,
        is_causal=tile.kind == "causal",
        return_debug_mask=False,
        scale=scale,
    )
    # lse [1, H, S] or, by the version, [1, H, S, 1]
    return out[0].transpose(0, 1), lse.reshape(q.shape[1], q.shape[0])


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
    # out and dout need the same strides.
    """dq, dk, dv of a tile, from the out and lse of the whole row; see `backends`."""
    dout, out = dout.contiguous(), out.contiguous()
    # seed and offset, never read without dropout
    empty = torch.empty((), dtype=torch.long, device=q.device)
    grads = operators.backward(
        "_scaled_dot_product_cudnn_attention",
        grad_out=_bhsd(dout),
        query=_bhsd(q),
        key=_bhsd(k),
        value=_bhsd(v),
        out=_bhsd(out),
        logsumexp=lse.contiguous().view(1, *lse.shape, 1),
        philox_seed=empty,
        philox_offset=empty,
        attn_bias=None,
        cum_seq_q=None,
        cum_seq_k=None,
        max_q=q.shape[0],
        max_k=k.shape[0],
        dropout_p=0.0,
        is_causal=tile.kind == "causal",
        scale=scale,
    )
    dq, dk, dv = (g[0].transpose(0, 1) for g in grads)
    return dq, dk, dv


def _bhsd(x: Tensor) -> Tensor:
    # [S, H, D] -> [1, H, S, D], rows contiguous in memory
    return x.contiguous().transpose(0, 1).unsqueeze(0)
