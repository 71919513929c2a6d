"""How far results are from what they should be."""

from __future__ import annotations

import math

import pytest
import torch

from longfactory.sp.distance import worst


@pytest.mark.parametrize("place", range(3))
def test_the_worst_of_some_errors_is_nan_wherever_it_stands(place: int) -> None:
    errors = [1.0, 3.0]
    errors.insert(place, math.nan)
    assert math.isnan(worst(errors))
    assert math.isnan(worst(torch.tensor(errors)))


def test_the_worst_of_some_errors_is_the_largest() -> None:
    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert worst(x for x in (torch.tensor(1.0), 0.5)) == 1.0
    with pytest.raises(ValueError):
        worst([])
