"""What the output layer gives to a loss: one number (or flag) a token."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TokenOutputs:
    """Vectors over tokens, in the row's natural order once gathered. Entries without a label are 0 (False)."""

    logps: Tensor
    """[T] log-probability of the label, fp32 (fp64 for fp64)."""
    top1: Tensor | None = None
    """[T] bool: the label was the most probable token."""
