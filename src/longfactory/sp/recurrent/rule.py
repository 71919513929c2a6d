"""What a recurrence computes of a token, a head and a state."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["plain", "delta"]
CHUNK = 64
"""Tokens of a chunk."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one recurrence computes.

    Attributes:
        kind: whether a token first takes out what the state has of its key.
        scale: of the queries.
        normalize: queries and keys are divided by their length.
        eps: added to the squared length.
    """

    kind: Kind
    scale: float
    normalize: bool = False
    eps: float = 1e-6


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalized(x: Tensor, rule: Rule) -> Tensor:
    """In a wide type, divided by its length where the rule says so."""
    x = x.to(wide(x))
    if rule.normalize:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + rule.eps)
    return x
