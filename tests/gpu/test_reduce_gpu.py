"""NCCL's reduction of gradients between two GPUs: in bf16 the bits of fp32's, rounded."""

from __future__ import annotations

import pytest
import torch

import reduce_ranks
from longfactory.testing import run_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_two_gpus_reduce_bf16_to_the_same_bits() -> None:
    body = reduce_ranks.reduced_in_bf16_and_in_fp32
    assert run_ranks(2, body, "cuda", process_group="nccl") == [(True, True)] * 2
