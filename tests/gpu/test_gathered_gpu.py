"""Weights that two GPUs gather beside the update of others, or where they are used, are those after
it, or copied there."""

from __future__ import annotations

import pytest
import torch

import gathered_ranks
from longfactory.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]


def test_gathers_beside_the_update_and_without_copies_have_the_bits_of_others() -> None:
    runs = [
        run_ranks(2, gathered_ranks.weights_after_steps, *how, process_group="nccl")
        for how in ((False, True), (False, True), (True, True), (False, False), (True, False))
    ]
    copied, again, *others = runs
    assert copied == again, "this model is not the same twice"
    beside_the_update, without_copies, both = others
    assert copied == beside_the_update
    assert copied == without_copies
    assert copied == both
