from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longfactory import sp
from longfactory.sp import kernels
from longfactory.testing import run_ranks
from plain_attention import context


def block(h: Tensor, w: Tensor, plan: sp.RowPlan, calls: int) -> Tensor:
    for _ in range(calls):
        q, k, v = (h @ w).view(-1, 3, 4, 4).unbind(1)
        h = h + sp.attention(q, k, v, plan, window=9).flatten(1)
    return h


def checkpointed(mode: str) -> list[tuple[float, float, int, int]]:
    """Without checkpointing, with, and with `keep`: difference of out and of the weight's gradient
    from the first, kernel calls, kept.
    """
    plan = sp.plan(32, None, context(mode))
    w = torch.randn(
        16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    x = torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = [0]
    original = kernels.forward

    def counted(*args: object) -> None:
        count[0] += 1
        original(*args)  # type: ignore[arg-type]

    store: list[tuple[Tensor, Tensor]] = []
    body = functools.partial(block, w=w, plan=plan, calls=2)
    kept = functools.partial(
        checkpoint, body, use_reentrant=False, context_fn=lambda: (sp.keep(store), sp.keep(store))
    )
    variants: list[Callable[[Tensor], Tensor]] = [
        body,
        functools.partial(checkpoint, body, use_reentrant=False),
        kept,
        kept,
    ]
    kernels.forward = counted  # type: ignore[assignment]
    try:
        out = []
        for variant in variants:
            w.grad, count[0] = None, 0
            y = variant(sp.shard(x, plan))
            held = len(store)
            y.square().sum().backward()
            assert w.grad is not None
            out.append((y.detach(), w.grad.clone(), count[0], held))
    finally:
        kernels.forward = original
    assert not store, "the recompute empties the store"
    return [
        ((y - out[0][0]).abs().max().item(), (g - out[0][1]).abs().max().item(), n, held)
        for y, g, n, held in out
    ]


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_recompute_under_keep_runs_no_kernel(mode: str) -> None:
    for plain, checkpointed_, first, second in run_ranks(2, checkpointed, mode):
        calls = plain[2]
        assert checkpointed_[2:] == (2 * calls, 0)
        assert first == second == (0.0, 0.0, calls, 2)


def test_a_recompute_with_more_calls_is_refused() -> None:
    plan = sp.plan(8, None, sp.SequenceParallel())
    w, x = torch.randn(16, 48), torch.randn(8, 16)
    store: list[tuple[Tensor, Tensor]] = []
    with sp.keep(store):
        block(x, w, plan, 1)
    with pytest.raises(RuntimeError, match="more attention calls"), sp.keep(store):
        block(x, w, plan, 2)


def test_a_recompute_with_another_shape_is_refused() -> None:
    plan = sp.plan(8, None, sp.SequenceParallel())
    q = torch.randn(8, 2, 4)
    store: list[tuple[Tensor, Tensor]] = []
    with sp.keep(store):
        sp.attention(q, q, q, plan)
    with pytest.raises(RuntimeError, match="forward pass kept"), sp.keep(store):
        sp.attention(q[:, :1], q[:, :1], q[:, :1], plan)
