"""What sentences of the guard share."""

from __future__ import annotations

import math

import torch

from .. import compare
from ..probe import Asked


def text_of(asked: set[Asked]) -> str:
    def one(a: Asked) -> str:
        return ", ".join(
            f"{k} {v:.6g}" if k == "scale" else f"{k} {v}" for k, v in a._asdict().items()
        )

    return " or ".join(one(a) for a in sorted(asked, key=str)) or "nothing"


def worst(found: dict[str, float]) -> tuple[str, float]:
    return max(found.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def times_as_far(ratio: float, dtype: torch.dtype) -> str:
    wide = short(compare.reference_dtype(dtype))
    return (
        f"{ratio:.3g} times as far from a computation in {wide} (tolerated:"
        f" {compare.limit(dtype):.3g} times)"
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
