"""Each collective's backward is its adjoint: <y, A x> = <A* y, x>, summed over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longfactory import sp
from longfactory.sp import Segment
from longfactory.testing import run_ranks
from plain_attention import context

SEGMENTS = (Segment(0, 9), Segment(9, 24), Segment(24, 32))


def operators(mode: str) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    ctx = context(mode)
    plan = sp.plan(32, SEGMENTS, ctx)
    n = ctx.size
    return {
        "all_gather": (functools.partial(sp.all_gather, group=ctx.group), (3, 2)),
        "reduce_scatter": (functools.partial(sp.reduce_scatter, group=ctx.group), (3 * n, 2)),
        "all_reduce": (functools.partial(sp.all_reduce, group=ctx.group), (3, 2)),
        "all_to_all": (functools.partial(sp.all_to_all, group=ctx.group), (n, 3, 2)),
        "shard": (functools.partial(sp.shard, plan=plan), (32, 3)),
        "gather": (functools.partial(sp.gather, plan=plan), (32 // n, 3)),
        "gather of a vector": (functools.partial(sp.gather, plan=plan), (32 // n,)),
    }


def adjoint(mode: str, name: str) -> float:
    """|<y, A x> - <A* y, x>|, with x a permuted, not contiguous tensor."""
    apply, shape = operators(mode)[name]
    g = torch.Generator().manual_seed(dist.get_rank())
    x = (
        torch.randn(shape[::-1], dtype=torch.float64, generator=g)
        .permute(*reversed(range(len(shape))))
        .requires_grad_()
    )
    out = apply(x)
    y = torch.randn(out.shape[::-1], dtype=torch.float64, generator=g).permute(
        *reversed(range(out.dim()))
    )
    (grad,) = torch.autograd.grad(out, x, y)
    products = torch.stack([(y * out).sum().detach(), (grad * x).sum().detach()])
    dist.all_reduce(products)
    return (products[0] - products[1]).abs().item()


@pytest.mark.processes
@pytest.mark.parametrize(
    "name",
    [
        "all_gather",
        "reduce_scatter",
        "all_reduce",
        "all_to_all",
        "shard",
        "gather",
        "gather of a vector",
    ],
)
@pytest.mark.parametrize("mode", ["zigzag-ring", "llama3"])
def test_backward_is_the_adjoint(mode: str, name: str) -> None:
    assert max(run_ranks(4, adjoint, mode, name)) <= 1e-12


def round_trip(mode: str) -> bool:
    plan = sp.plan(32, SEGMENTS, context(mode))
    x = torch.arange(64).view(32, 2)
    local = sp.shard(x, plan)
    return torch.equal(local, x[plan.index]) and torch.equal(sp.gather(local, plan), x)


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_gather_undoes_shard_and_index_names_the_rows(mode: str) -> None:
    assert all(run_ranks(4, round_trip, mode))


def test_wrong_lengths_are_refused() -> None:
    plan = sp.plan(8, None, sp.SequenceParallel())
    with pytest.raises(ValueError, match="8 tokens, the tensor has 7"):
        sp.shard(torch.zeros(7), plan)
    with pytest.raises(ValueError, match="8 tokens, the tensor has 7"):
        sp.gather(torch.zeros(7), plan)
