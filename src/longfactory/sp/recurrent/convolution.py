"""Short causal convolutions of each channel, for all documents of a row at once and over all ranks:
the few tokens before a stretch travel to it, and before a document there are zeros.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from ..collectives import all_gather
from .checked import are_right
from .fragments import Fragment, Fragments, Halo

log = logging.getLogger(__name__)


def kernels_on(x: Tensor, width: int, given: bool, bias: bool = True, silu: bool = True) -> Any:
    """The module of Triton kernels where it computes what `x` is, and is right on its device, or
    None.

    Args:
        given, bias, silu: rows of other ranks are read too, a bias is added, and silu is applied:
            by kernels of their own.
    """
    if x.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    from . import chunk_kernels, convolution_kernels

    if not chunk_kernels.runs_on(x.device):
        return None
    if width > convolution_kernels.WIDEST:
        _say_too_wide(width, convolution_kernels.WIDEST)
        return None
    right = _is_right(x.device, x.dtype, width, given, bias, silu)
    return convolution_kernels if right else None


@functools.cache
def _say_too_wide(width: int, widest: int) -> None:
    """Once a process."""
    log.warning(
        "Short convolutions of %d tokens run in PyTorch, slowly: LongFactory's Triton kernels take"
        " at most %d.",
        width,
        widest,
    )


@functools.cache
def _is_right(
    device: torch.device, dtype: torch.dtype, width: int, given: bool, bias: bool, silu: bool
) -> bool:
    """Computes two short documents by the kernels, forward and backward, and compares with
    PyTorch in float64. Once a process for each kind of call.
    """
    from . import convolution_kernels

    draw = torch.Generator().manual_seed(0)
    if given:  # the first document begins on another rank
        stretches = [Fragment(0, 0, 40, 0, -1), Fragment(1, 0, 40, 40, 0)]
    else:
        stretches = [Fragment(0, 0, 40, 0, -1)]
    rows = 300  # of two programs that sum
    last = Fragment(stretches[-1].rank, 40, rows - 40, 40, -1)
    fragments = Fragments((*stretches, last), last.rank, len(stretches), rows)
    halo = fragments.halo(width - 1, device)
    sent = len(halo.sent) * fragments.ranks
    sizes = [(rows, 16), (rows, 16), (sent, 16), (16, width), *([(16,)] if bias else [])]
    slope, *inputs = (torch.randn(*size, generator=draw).to(device, dtype) for size in sizes)

    def graded(run: Any, given: list[Tensor], slope: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        with torch.enable_grad():
            out = run(*leaves, *([] if bias else [None]), silu, halo)
        slopes = torch.autograd.grad(out, leaves, slope)
        return [out.detach(), *(x for x in slopes if x.numel())]

    def kernels() -> list[Tensor]:
        return graded(convolution_kernels.convolved, inputs, slope)

    def expected() -> list[Tensor]:
        return graded(_by_pytorch, [t.double() for t in inputs], slope.double())

    return are_right("Short convolutions run", kernels, expected, dtype)


def _by_pytorch(
    x: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, halo: Halo
) -> Tensor:
    # [T/n + what comes before each stretch, C] -> [1, C, ...]
    table, begins = halo.laid_out
    rows = torch.cat([x, given, x.new_zeros(1, x.shape[1])]).index_select(0, table)
    out = F.conv1d(rows.t()[None].to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    out = out[0].t().index_select(0, begins)
    return F.silu(out) if silu else out


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    fragments: Fragments,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The convolution of this rank's tokens. Differentiable. Collective where a document crosses
    ranks.

    Args:
        x: [T/n, C].
        weight: [C, K].
        bias: [C].
        activation: its name in transformers, or None.

    Returns:
        [T/n, C].
    """
    halo = fragments.halo(weight.shape[1] - 1, x.device)
    given = x[:0]
    if len(halo.sent):
        given = all_gather(x.index_select(0, halo.sent), group)
    silu = activation is not None
    kernels = kernels_on(x, weight.shape[1], len(given) > 0, bias is not None, silu)
    if kernels is not None and activation in kernels.ACTIVATIONS:
        out: Tensor = kernels.convolved(x, given, weight, bias, silu, halo)
        return out
    out = _by_pytorch(x, given, weight, bias, False, halo)
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(x.dtype)
