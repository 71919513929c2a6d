"""Attention over a union of key sets from attention over each: the running softmax merge, in float32 or float64.

    lse = logaddexp(lse_a, lse_b);  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

The sums are rounded to the inputs' dtype once, at the end, so the error of bfloat16 inputs does not grow with the number of tiles. A
row that is merged only once is written in place in its own dtype: that is the same single rounding, without float32 copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

merge_rows: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None
try:
    from .merge_kernel import merge_rows
except ImportError:  # Triton comes with CUDA builds of PyTorch
    merge_rows = None


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Adds a block to (out [S, H, D], lse [H, S]) in place. Rows that saw nothing have lse -inf, on either side."""
    if merge_rows is not None and out.is_cuda and lse.dtype == torch.float32:
        merge_rows(out, lse, block_out, block_lse)
        return
    # With x = block_lse - lse: the block's weight is sigmoid(x). Both -inf gives nan, which means: nothing on either side.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(0.0).t().unsqueeze(-1)
    wide = accumulator_dtype(out.dtype)
    out.copy_(torch.lerp(out.to(wide), block_out.to(wide), weight.to(wide)))
    lse.copy_(torch.logaddexp(lse, block_lse))


class Output:
    """The running (out, lse) of a rank's queries. A single tile that covers all of them is kept as it is, without a copy.

    `once`: no row is merged more than once, and nothing is computed from `out` before it is rounded.
    """

    def __init__(self, rows: int, once: bool = False) -> None:
        self.rows = rows
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self._owned = once

    def add(self, rows: slice, out: Tensor, lse: Tensor, first: bool) -> None:
        """`first`: nothing was added to these rows before. Every row has such a tile before any other."""
        if first:
            if rows.stop - rows.start == self.rows:
                self.out, self.lse = out, lse
                return
            if self.out is None or self.lse is None:
                dtype = out.dtype if self._owned else accumulator_dtype(out.dtype)
                self.out = torch.empty((self.rows, *out.shape[1:]), dtype=dtype, device=out.device)
                self.lse = torch.empty((lse.shape[0], self.rows), dtype=lse.dtype, device=lse.device)
                self._owned = True
            self.out[rows], self.lse[:, rows] = out, lse
            return
        assert self.out is not None and self.lse is not None
        if not self._owned:
            self.out = self.out.to(accumulator_dtype(self.out.dtype), memory_format=torch.contiguous_format, copy=True)
            self._owned = True
        merge_(self.out[rows], self.lse[:, rows], out, lse)


class Sum:
    """A running sum of row blocks, from nothing. The first block that covers all rows is kept as it is.

    `once`: no row is added to more than once, so that the sum may be rounded as it is made.
    """

    def __init__(self, like: Tensor, once: bool = False) -> None:
        self.like = like
        self.once = once
        self.total: Tensor | None = None
        self._owned = False

    def add(self, rows: slice, x: Tensor) -> None:
        if self.total is None and rows.stop - rows.start == self.like.shape[0]:
            self.total, self._owned = x, self.once
            return
        self._own(x)
        assert self.total is not None
        self.total[rows] += x

    def add_rows(self, index: Tensor, x: Tensor) -> None:
        """Adds to the rows `index`, each named at most once, so that the order of addition is fixed."""
        self._own(x)
        assert self.total is not None
        self.total.index_add_(0, index, x.to(self.total.dtype))

    def _own(self, x: Tensor) -> None:
        dtype = accumulator_dtype(x.dtype)
        if self.total is None:
            self.total = torch.zeros(self.like.shape, dtype=dtype, device=x.device)
        elif not self._owned:
            self.total = self.total.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self._owned = True

    def result(self) -> Tensor:
        """What was added so far, in the dtype in which it is held; zeros if nothing."""
        if self.total is None:
            return torch.zeros(self.like.shape, dtype=self.like.dtype, device=self.like.device)
        return self.total
