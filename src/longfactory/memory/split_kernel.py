"""One AdamW step of split master weights in one pass over memory, 26 bytes a parameter: PyTorch's
elementwise operations take some sixty (`split_masters.join`, `split_into`).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of one program


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    weight,
    low,
    grad,
    first,
    second,
    count,
    scale,
    decay,
    one_minus_beta1,
    one_minus_beta2,
    step_size,
    root_correction,
    eps,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    valid = at < count
    high = tl.load(weight + at, mask=valid, other=0).to(tl.int32)
    bits = (high << 16) + tl.load(low + at, mask=valid, other=0).to(tl.int32)
    master = bits.to(tl.float32, bitcast=True)
    g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32) * scale
    m = tl.load(first + at, mask=valid, other=0.0)
    v = tl.load(second + at, mask=valid, other=0.0)
    master = master - decay * master
    m = m + (g - m) * one_minus_beta1
    v = v + (g * g - v) * one_minus_beta2
    below = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    master = master - tl.div_rn(step_size * m, below)
    bits = master.to(tl.int32, bitcast=True)
    tl.store(first + at, m, mask=valid)
    tl.store(second + at, v, mask=valid)
    tl.store(weight + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=valid)
    tl.store(low + at, bits.to(tl.int16), mask=valid)


def update(
    weight: Tensor,
    low: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: float,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW in fp32, in place, of flat tensors of one length on one GPU.

    Args:
        weight: bf16. low: int16, the remainders of the masters. grad: bf16 or fp32.
        first, second: fp32, the moments.
        step: the number of this step, from 1. scale: of the gradient.
    """
    count = weight.numel()
    if count == 0:
        return
    corrections = [1.0 - beta**step for beta in betas]
    _update[(triton.cdiv(count, BLOCK),)](
        weight.view(low.dtype),
        low,
        grad,
        first,
        second,
        count,
        float(scale),
        lr * weight_decay,
        1.0 - betas[0],
        1.0 - betas[1],
        lr / corrections[0],
        math.sqrt(corrections[1]),
        float(eps),
        SIZE=BLOCK,
        num_warps=8,
    )
