"""How far tensors are from those that they are held against: the arithmetic that the guard,
`verify`, the check of the output layer, the family sweep and the tests share. Everything is
computed in float64; what counts as far is each one's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def difference(found: Tensor | None, expected: Tensor) -> Tensor:
    """[...] found - expected, in float64. `found` of None stands for zeros."""
    wide = expected.double()
    return -wide if found is None else found.double() - wide


def distance(found: Tensor | None, expected: Tensor) -> Tensor:
    """[]: the 2-norm of the difference."""
    return difference(found, expected).norm()


def largest(found: Tensor, expected: Tensor) -> Tensor:
    """[]: the largest absolute difference; 0 of no numbers, NaN where one is."""
    if not expected.numel():
        return torch.zeros((), dtype=torch.float64, device=expected.device)
    return difference(found, expected).abs().max()


def worst(errors: Iterable[float | Tensor]) -> float:
    """The largest of at least one; NaN where one of them is, which Python's `max` passes over
    unless it comes first.
    """
    found = [float(e.detach()) if isinstance(e, Tensor) else float(e) for e in errors]
    return math.nan if any(map(math.isnan, found)) else max(found)


def norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all of them as one vector."""
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))
