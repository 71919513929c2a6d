"""Short causal convolutions of each channel, for all documents of a row at once and over all ranks:
the few tokens before a stretch travel to it, and before a document there are zeros.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from ..collectives import all_gather
from .fragments import Fragments


def kernels_on(x: Tensor) -> Any:
    """The module of Triton kernels where it computes what `x` is, or None."""
    if x.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    from . import chunk_kernels, convolution_kernels

    return convolution_kernels if chunk_kernels.runs_on(x.device) else None


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
    if (kernels := kernels_on(x)) is not None and activation in kernels.ACTIVATIONS:
        out = kernels.convolved(x, given, weight, bias, activation is not None, halo)
        return out
    # [T/n + what comes before each stretch, C] -> [1, C, ...]
    rows = torch.cat([x, given, x.new_zeros(1, x.shape[1])]).index_select(0, halo.table)
    out = F.conv1d(rows.t()[None].to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])[
        0
    ].t()
    out = out.index_select(0, halo.outputs)
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(x.dtype)
