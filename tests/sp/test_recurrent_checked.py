"""The self-test of Triton's kernels for recurrences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longfactory.sp.recurrent.checked import are_right


@pytest.mark.parametrize("wrong", [0, 1])
def test_recurrent_kernels_whose_results_are_not_numbers_are_not_right(wrong: int) -> None:
    results = [torch.ones(3), torch.ones(3)]
    expected = [x.double() for x in results]
    assert are_right("A recurrence runs", lambda: results, lambda: expected, torch.float32)
    broken = [x.clone() for x in results]
    broken[wrong][1] = math.nan
    assert not are_right("A recurrence runs", lambda: broken, lambda: expected, torch.float32)


def test_a_self_test_that_fails_names_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    results = [torch.ones(3), 2 * torch.ones(3), torch.ones(3)]
    expected = [torch.ones(3, dtype=torch.float64) for _ in results]
    names = ("output", "gradient of q", "gradient of k")
    assert not are_right(
        "A recurrence runs", lambda: results, lambda: expected, torch.float32, names
    )
    assert "is 1.0e+00 from float64 (gradient of q 1.0e+00) on this device" in caplog.text


def test_a_self_test_in_a_checkpointed_layer_is_not_counted_among_what_it_saves() -> None:
    """It comes at the first call alone, not in the recomputation."""
    tried: list[bool] = []

    def example() -> list[Tensor]:
        x = torch.ones(3, requires_grad=True)
        return list(torch.autograd.grad((x * x).exp().sum(), x))

    def layer(x: Tensor) -> Tensor:
        if not tried:
            tried.append(are_right("A recurrence runs", example, example, torch.float32))
        return (x * x).sin()

    x = torch.ones(5, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert tried == [True] and x.grad is not None
