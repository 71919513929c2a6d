"""Results over different keys are merged by their log-sum-exp."""

from __future__ import annotations

import pytest
import torch

from longfactory.sp.merge import merge_
from plain_attention import random_inputs
from simulated_ring import relative_rms, simulated_ring


def test_merge_of_blocks_that_see_nothing() -> None:
    out, lse = torch.zeros(3, 1, 2), torch.tensor([[-torch.inf, -torch.inf, 0.5]])
    block, block_lse = torch.ones(3, 1, 2), torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    merge_(out, lse, block, block_lse)
    assert out[:, 0, 0].tolist() == [0.0, 1.0, 0.0]
    assert lse[0].tolist() == [-torch.inf, 1.0, 0.5]


@pytest.mark.parametrize("ranks", [2, 32])
def test_error_does_not_grow_with_the_number_of_ranks(ranks: int) -> None:
    """bfloat16 rms error of out, dq, dk, dv of a ring of so many ranks, against one call, both
    measured from float64.
    """
    q, k, v, dout = random_inputs(512, 4, 2, 64, dtype=torch.bfloat16)
    exact = simulated_ring(1, q.double(), k.double(), v.double(), dout.double())
    one = relative_rms(simulated_ring(1, q, k, v, dout), exact)
    many = relative_rms(simulated_ring(ranks, q, k, v, dout), exact)
    assert all(m <= 1.2 * o for m, o in zip(many, one, strict=True)), (many, one)
