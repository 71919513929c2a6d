"""GPU kernels want head dims that are multiples of 8: zeros change no score and add columns that
are cut off again.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def pad_head(x: Tensor, multiple: int = 8, at_least: int = 0) -> Tensor:
    """[..., D] -> [..., D'] with D' >= at_least a multiple of `multiple`; x itself where D already
    is.
    """
    want = -(-max(x.shape[-1], at_least) // multiple) * multiple
    return x if want == x.shape[-1] else pad(x, (0, want - x.shape[-1]))


def cut_head(x: Tensor, dim: int) -> Tensor:
    """[..., D'] -> [..., dim], the adjoint of `pad_head`."""
    return x if x.shape[-1] == dim else x[..., :dim]
