"""No tensor waits for Python's garbage collector: on a GPU, one in a circle of references is memory
that a step does not have.
"""

from __future__ import annotations

import gc

import pytest
import torch

from longfactory import sp
from longfactory.sp import Segment
from longfactory.testing import run_ranks
from plain_attention import context, random_inputs

pytestmark = pytest.mark.processes


def left_in_circles(mode: str, packed: bool) -> list[str]:
    ctx = context(mode, heads=4, kv=2)
    segments = [Segment(0, 30), Segment(30, 70), Segment(70, 96)] if packed else None
    plan = sp.plan(96, segments, ctx)
    tensors = [sp.shard(x, plan) for x in random_inputs(96, 4, 2, 8, dtype=torch.float32)]

    def step() -> None:
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        torch.autograd.grad(sp.attention(*leaves, plan), leaves, tensors[3])

    step()  # what is made once and kept
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        step()
        gc.collect()
        return [f"{x.dtype} {tuple(x.shape)}" for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("processes", "mode"), [(2, "zigzag-ring"), (3, "zigzag-ring"), (2, "ulysses"), (2, "llama3")]
)
def test_no_tensor_of_a_schedule_is_left_in_a_circle(
    processes: int, mode: str, packed: bool
) -> None:
    assert run_ranks(processes, left_in_circles, mode, packed, timeout=120) == [[]] * processes
