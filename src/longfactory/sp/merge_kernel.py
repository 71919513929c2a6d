"""The merge in one pass over memory: read out and block, write out. Eager PyTorch takes five
passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out,
    lse,
    block,
    block_lse,
    rows,
    dim,
    out_row,
    out_head,
    lse_head,
    lse_row,
    block_row,
    block_head,
    block_lse_head,
    block_lse_row,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, DIM)
    valid = row < rows
    a = tl.load(lse + head * lse_head + row * lse_row, mask=valid, other=0.0)
    b = tl.load(block_lse + head * block_lse_head + row * block_lse_row, mask=valid, other=0.0)
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)  # neither side saw anything
    share = tl.exp(b - top)
    total = tl.exp(a - top) + share
    weight = tl.where(total > 0, share / total, 0.0)
    # Every warp reads the row's log-sum-exp, one of them writes it: none may write before all have
    # read.
    tl.debug_barrier()
    tl.store(lse + head * lse_head + row * lse_row, top + tl.log(total), mask=valid)
    both = valid[:, None] & (col < dim)[None, :]
    at = out + row[:, None] * out_row + head * out_head + col[None, :]
    x = tl.load(at, mask=both, other=0.0).to(tl.float32)
    y = tl.load(
        block + row[:, None] * block_row + head * block_head + col[None, :], mask=both, other=0.0
    ).to(tl.float32)
    tl.store(at, (x + weight[:, None] * (y - x)).to(out.dtype.element_ty), mask=both)


def merge_rows(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """See merge_. The head dim is contiguous in both; rows and heads may have any strides."""
    rows, heads, dim = out.shape
    if block_out.stride(2) != 1:
        block_out = block_out.contiguous()
    if out.stride(2) != 1:
        raise ValueError("the running output needs a contiguous head dim")
    wide = triton.next_power_of_2(dim)
    block = max(1, 4096 // wide)
    strides = (*out.stride()[:2], *lse.stride(), *block_out.stride()[:2], *block_lse.stride())
    _merge[(triton.cdiv(rows, block), heads)](
        out, lse, block_out, block_lse, rows, dim, *strides, ROWS=block, DIM=wide, num_warps=4
    )
