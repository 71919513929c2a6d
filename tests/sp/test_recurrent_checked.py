"""The self-test of Triton's kernels for recurrences."""

from __future__ import annotations

import math

import pytest
import torch

from longfactory.sp.recurrent.checked import are_right


@pytest.mark.parametrize("wrong", [0, 1])
def test_recurrent_kernels_whose_results_are_not_numbers_are_not_right(wrong: int) -> None:
    results = [torch.ones(3), torch.ones(3)]
    expected = [x.double() for x in results]
    assert are_right("A recurrence runs", lambda: results, lambda: expected, torch.float32)
    broken = [x.clone() for x in results]
    broken[wrong][1] = math.nan
    assert not are_right("A recurrence runs", lambda: broken, lambda: expected, torch.float32)
