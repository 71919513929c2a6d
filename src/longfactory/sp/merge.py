"""Attention over a union of key sets from attention over each: the running softmax merge, in
float32 or float64.

    lse = logaddexp(lse_a, lse_b);  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

The sums are rounded to the inputs' dtype once, at the end, so the error of bfloat16 inputs does not
grow with the number of tiles. A row that is merged only once is written in place in its own dtype:
that is the same single rounding, without float32 copies.
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
    """In which results over several tiles are added: float32 (float64 for float64)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Adds a block to (out [S, H, D], lse [H, S]) in place. Rows that saw nothing have lse -inf, on
    either side.
    """
    if merge_rows is not None and out.is_cuda and lse.dtype == torch.float32:
        merge_rows(out, lse, block_out, block_lse)
        return
    # With x = block_lse - lse: the block's weight is sigmoid(x). Both -inf gives nan, which means:
    # nothing on either side.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(0.0).t().unsqueeze(-1)
    wide = accumulator_dtype(out.dtype)
    out.copy_(torch.lerp(out.to(wide), block_out.to(wide), weight.to(wide)))
    lse.copy_(torch.logaddexp(lse, block_lse))


class Output:
    """The running (out, lse) of a rank's queries. A single tile that covers all of them is kept as
    it is, without a copy.

    `once`: no row is merged more than once, and nothing is computed from `out` before it is
    rounded.
    """

    def __init__(self, rows: int, once: bool = False) -> None:
        self.rows = rows
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self._owned = once

    def add(self, rows: slice, out: Tensor, lse: Tensor, first: bool) -> None:
        """`first`: nothing was added to these rows before. Every row has such a tile before any
        other.
        """
        if first:
            if rows.stop - rows.start == self.rows:
                self.out, self.lse = out, lse
                return
            if self.out is None or self.lse is None:
                dtype = out.dtype if self._owned else accumulator_dtype(out.dtype)
                self.out = torch.empty((self.rows, *out.shape[1:]), dtype=dtype, device=out.device)
                self.lse = torch.empty(
                    (lse.shape[0], self.rows), dtype=lse.dtype, device=lse.device
                )
                self._owned = True
            self.out[rows], self.lse[:, rows] = out, lse
            return
        assert self.out is not None and self.lse is not None
        if not self._owned:
            self.out = self.out.to(
                accumulator_dtype(self.out.dtype), memory_format=torch.contiguous_format, copy=True
            )
            self._owned = True
        merge_(self.out[rows], self.lse[:, rows], out, lse)


class Sum:
    """A running sum of row blocks, from nothing. A first block that covers all rows is kept as it
    is, without a copy.

    `once`: no row is added to more than once, so that the sum may be rounded as it is made.
    `memory`: asked for when there is something to hold; gives the tensor to add in, and whether it
    is a sum already.
    """

    def __init__(
        self,
        like: Tensor,
        once: bool = False,
        memory: Callable[[], tuple[Tensor, bool]] | None = None,
    ) -> None:
        self.like = like
        self.once = once
        self.memory = memory
        self.total: Tensor | None = None
        self._wide = False  # it may be added to in place
        self._filling = False  # its rows are being written for the first time

    def add(self, rows: slice, x: Tensor, first: bool = False) -> None:
        """`first`: nothing was added to these rows before. If there is such a block, every row has
        one before any other block.
        """
        if (
            self.total is None
            and self.memory is None
            and rows.stop - rows.start == self.like.shape[0]
        ):
            self.total, self._wide = x, self.once
            return
        if self.total is None:
            self.total, begun = self._take(x.dtype if self.once else accumulator_dtype(x.dtype))
            self._filling = first and not begun
            if not first and not begun:  # written rather than added to zeros
                self.total[: rows.start].zero_()
                self.total[rows.stop :].zero_()
                self.total[rows].copy_(x)
                return
        if self._filling and first:
            self.total[rows].copy_(x)
            return
        # Not `total[rows] += x`, which copies the rows onto themselves as well.
        self._widened()[rows].add_(x)

    def add_rows(self, index: Tensor, x: Tensor) -> None:
        """Adds to the rows `index`, each named at most once, so that the order of addition is
        fixed.
        """
        self.total = self.result()
        total = self._widened()
        total.index_add_(0, index, x.to(total.dtype))

    def result(self) -> Tensor:
        """What was added so far, in the dtype in which it is held; zeros if nothing."""
        if self.total is None:
            self.total, begun = self._take(self.like.dtype)
            if not begun:
                self.total.zero_()
        return self.total

    def _take(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        self._wide = self.memory is not None or self.once or dtype == accumulator_dtype(dtype)
        return (
            self.memory()
            if self.memory is not None
            else (torch.empty(self.like.shape, dtype=dtype, device=self.like.device), False)
        )

    def _widened(self) -> Tensor:
        assert self.total is not None
        self._filling = False
        if not self._wide:
            self.total = self.total.to(
                accumulator_dtype(self.total.dtype),
                memory_format=torch.contiguous_format,
                copy=True,
            )
            self._wide = True
        return self.total
