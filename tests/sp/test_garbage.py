"""No tensor waits for Python's garbage collector: on a GPU, one in a circle of references is memory
that a step does not have.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from longfactory import sp
from longfactory.sp import Segment
from longfactory.sp.schedules import gather, ring
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


def held_after_the_wait(mode: str) -> int:
    """Exchanges of a backward that are there when its gradients of keys have been waited for, while
    the function that waited is held.
    """
    ctx = context(mode, heads=4, kv=2)
    plan = sp.plan(96, None, ctx)
    q, k, v, dout = (sp.shard(x, plan) for x in random_inputs(96, 4, 2, 8, dtype=torch.float32))
    out, lse = sp.attention_forward(q, k, v, plan)
    exchanges: list[weakref.ref[Any]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for kind in (ring.Exchange, gather.Fetch):

            def noted(self: Any, *args: Any, make: Any = kind.__init__) -> None:
                make(self, *args)
                exchanges.append(weakref.ref(self))

            monkeypatch.setattr(kind, "__init__", noted)
        _, of_keys, _ = sp.attention_backward_in_parts(dout, q, k, v, out, lse, plan)
    gc.disable()
    try:
        of_keys()
        assert exchanges
        return sum(exchange() is not None for exchange in exchanges)
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["zigzag-ring", "llama3"])
def test_what_gradients_of_keys_came_in_is_given_up(mode: str) -> None:
    assert run_ranks(2, held_after_the_wait, mode, timeout=120) == [0, 0]
