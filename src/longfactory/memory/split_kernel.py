"""One AdamW step of split master weights in one pass over memory, 26 bytes a parameter: PyTorch's
elementwise operations take some sixty (`split_masters.join`, `split_into`).

One call of the kernel updates all parameters: it finds their tensors by their addresses. A call for
each keeps the host as long as the GPU, which then waits for the host's next work: 15 ms of a step
of 69 parameters (benchmarks/results/step_parts.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfactory.sp.pinned import copied

BLOCK = 2048  # numbers of one program
ALIGNED = 16  # bytes: what one load of a thread takes; and numbers that are masked alike

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one parameter, of one length: weight (bf16), remainder (int16), gradient (bf16 or fp32), first
and second moment (fp32).
"""


@triton.jit
def _at(address, at, of: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointers of numbers in the memory that begins at what is read from `address`."""
    pointers = tl.load(address).to(tl.pointer_type(of)) + at
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    rows,
    row_of,
    scale,
    decay,
    one_minus_beta1,
    one_minus_beta2,
    step_size,
    root_correction,
    eps,
    SIZE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    row = rows + tl.load(row_of + program).to(tl.int64) * 7
    at = (program - tl.load(row + 6)) * SIZE + tl.arange(0, SIZE)
    valid = at < tl.load(row + 5)
    if ALIGNED:
        valid = tl.max_constancy(valid, 16)
    weight, low = _at(row, at, tl.int16, ALIGNED), _at(row + 1, at, tl.int16, ALIGNED)
    grad = _at(row + 2, at, GRADIENT, ALIGNED)
    first, second = _at(row + 3, at, tl.float32, ALIGNED), _at(row + 4, at, tl.float32, ALIGNED)
    high = tl.load(weight, mask=valid, other=0).to(tl.int32)
    bits = (high << 16) + tl.load(low, mask=valid, other=0).to(tl.int32)
    master = bits.to(tl.float32, bitcast=True)
    g = tl.load(grad, mask=valid, other=0.0).to(tl.float32) * scale
    m = tl.load(first, mask=valid, other=0.0)
    v = tl.load(second, mask=valid, other=0.0)
    master = master - decay * master
    m = m + (g - m) * one_minus_beta1
    v = v + (g * g - v) * one_minus_beta2
    below = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    master = master - tl.div_rn(step_size * m, below)
    bits = master.to(tl.int32, bitcast=True)
    tl.store(first, m, mask=valid)
    tl.store(second, v, mask=valid)
    tl.store(weight, ((bits + 0x8000) >> 16).to(tl.int16), mask=valid)
    tl.store(low, bits.to(tl.int16), mask=valid)


def update(
    parameters: Sequence[Tensors],
    *,
    step: float,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW in fp32, in place, of parameters on one GPU whose tensors are contiguous in memory.

    Args:
        step: the number of this step, from 1. scale: of the gradient.
    """
    kinds: dict[tuple[bool, bool], list[list[int]]] = {}
    for tensors in parameters:
        addresses = [t.data_ptr() for t in tensors]
        count = tensors[0].numel()
        if count:
            aligned = not any(number % ALIGNED for number in (*addresses, count))
            kind = (tensors[2].dtype == torch.float32, aligned)
            kinds.setdefault(kind, []).append([*addresses, count])
    corrections = [1.0 - beta**step for beta in betas]
    for (wide, aligned), rows in kinds.items():
        device = parameters[0][0].device
        begins, row_of = _programs(tuple(row[5] for row in rows), device)
        table = torch.tensor([[*row, a] for row, a in zip(rows, begins, strict=True)])
        _update[(len(row_of),)](
            copied(table, device),
            row_of,
            float(scale),
            lr * weight_decay,
            1.0 - betas[0],
            1.0 - betas[1],
            lr / corrections[0],
            math.sqrt(corrections[1]),
            float(eps),
            SIZE=BLOCK,
            GRADIENT=tl.float32 if wide else tl.bfloat16,
            ALIGNED=aligned,
            num_warps=8,
        )


@functools.lru_cache(maxsize=64)
def _programs(counts: tuple[int, ...], device: torch.device) -> tuple[list[int], Tensor]:
    """The first program of each parameter, and the parameter of each program, int32 on the
    device.
    """
    programs = torch.tensor([triton.cdiv(count, BLOCK) for count in counts])
    begins = (programs.cumsum(0) - programs).tolist()
    numbers = torch.arange(len(counts), dtype=torch.int32)
    return begins, copied(torch.repeat_interleave(numbers, programs), device)
