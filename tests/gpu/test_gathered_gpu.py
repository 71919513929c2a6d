"""Weights that two GPUs gather beside the update of others are those after it."""

from __future__ import annotations

import pytest
import torch

import gathered_ranks
from longfactory.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]


def test_gathers_beside_the_update_have_the_bits_of_those_after_it() -> None:
    runs = [
        run_ranks(2, gathered_ranks.weights_after_steps, beside, process_group="nccl")
        for beside in (False, False, True)
    ]
    after, again, beside = runs
    assert after == again, "this model is not the same twice"
    assert after == beside
