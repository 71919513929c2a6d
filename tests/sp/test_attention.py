"""Every schedule against plain float64 attention: output, dq, dk, dv, dsinks on 2 and 4 processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from attention_ranks import BRANCHES, LENGTH, MASKS, ONE, PACKED, compare
from longfactory import sp
from longfactory.sp import Segment
from longfactory.sp.distance import worst
from longfactory.testing import RankError, run_ranks
from plain_attention import context, random_inputs

# (processes, mode, ulysses degree)
SCHEDULES = [
    (2, "zigzag-ring", None),
    (2, "ulysses", None),
    (2, "llama3", None),
    (4, "zigzag-ring", None),
    (4, "ulysses", None),
    (4, "llama3", None),
    (4, "usp", 2),
]


@pytest.mark.processes
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("ranks", "mode", "ulysses"), SCHEDULES)
def test_schedule_and_mask(ranks: int, mode: str, ulysses: int | None, mask: str) -> None:
    for errors in run_ranks(ranks, compare, mode, ulysses, **MASKS[mask]):
        assert max(errors.values()) <= 1e-12, errors


@pytest.mark.processes
@pytest.mark.parametrize("mask", ["early end", "packed window sinks", "branches window"])
@pytest.mark.parametrize(("mode", "ulysses"), [("zigzag-ring", None), ("usp", 2)])
def test_ring_gives_way_to_a_fetch(mode: str, ulysses: int | None, mask: str) -> None:
    for errors in run_ranks(4, compare, mode, ulysses, **MASKS[mask], fetch=True):
        assert max(errors.values()) <= 1e-12, errors


@pytest.mark.processes
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (12, 4), (12, 6), (4, 2)])
@pytest.mark.parametrize(
    ("ranks", "mode", "ulysses"),
    [(4, "ulysses", None), (4, "usp", 2), (4, "zigzag-ring", None), (4, "llama3", None)],
)
def test_head_shapes(ranks: int, mode: str, ulysses: int | None, heads: int, kv_heads: int) -> None:
    """Key heads fewer than ranks, as many as query heads, and not dividing by the degree."""
    for errors in run_ranks(ranks, compare, mode, ulysses, PACKED, heads=heads, kv_heads=kv_heads):
        assert max(errors.values()) <= 1e-12, errors


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["usp", "auto", "ulysses"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (7, 1), (3, 3), (6, 2), (10, 5)])
def test_any_head_count(mode: str, heads: int, kv_heads: int) -> None:
    """Heads that four ranks cannot share evenly: the ring takes the rest. Key heads of any number,
    odd ones too.
    """
    for errors in run_ranks(
        4, compare, mode, None, PACKED, heads=heads, kv_heads=kv_heads, auto_heads=True
    ):
        assert max(errors.values()) <= 1e-12, errors


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3", "usp"])
@pytest.mark.parametrize(("dim", "v_dim"), [(5, 5), (12, 8)])
def test_head_dims(mode: str, dim: int, v_dim: int) -> None:
    """Not a multiple of 8, and different for keys and values (MLA)."""
    for errors in run_ranks(
        2, compare, mode, 1 if mode == "usp" else None, PACKED, dim=dim, v_dim=v_dim
    ):
        assert max(errors.values()) <= 1e-12, errors


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_shortest_row(mode: str) -> None:
    """Fewer tokens than chunks, padded up to one token a chunk."""
    segments = (Segment(0, 3), Segment(3, 8))
    for errors in run_ranks(4, compare, mode, None, segments):
        assert max(errors.values()) <= 1e-12, errors


def bitwise(mode: str) -> bool:
    plan = sp.plan(LENGTH, PACKED, context(mode))
    q, k, v, dout = (
        sp.shard(x, plan) for x in random_inputs(LENGTH, 8, 2, 8, dtype=torch.bfloat16)
    )
    first = _forward_backward(q, k, v, dout, plan)
    return all(
        torch.equal(a, b)
        for _ in range(3)
        for a, b in zip(first, _forward_backward(q, k, v, dout, plan), strict=True)
    )


def _forward_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, plan: sp.RowPlan
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sp.attention(*leaves, plan)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_repeatable_to_the_last_bit(mode: str) -> None:
    assert all(run_ranks(4, bitwise, mode))


def low_precision(mode: str, dtype: torch.dtype) -> tuple[float, float]:
    """Root mean square error of out, dq, dk, dv against float64: sharded, and of one process with
    the same dtype.
    """
    plan, alone = (
        sp.plan(LENGTH, PACKED, context(mode)),
        sp.plan(LENGTH, PACKED, sp.SequenceParallel()),
    )
    q, k, v, dout = random_inputs(LENGTH, 8, 2, 16, dtype=dtype)
    exact = _forward_backward(q.double(), k.double(), v.double(), dout.double(), alone)
    single = _forward_backward(q, k, v, dout, alone)
    shared = [
        sp.gather(x, plan)
        for x in _forward_backward(*(sp.shard(x, plan) for x in (q, k, v, dout)), plan)
    ]
    assert all(x.dtype == dtype for x in shared)

    def error(found: list[torch.Tensor]) -> float:
        return max(
            ((a.double() - b).pow(2).mean() / b.pow(2).mean()).sqrt().item()
            for a, b in zip(found, exact, strict=True)
        )

    return error(shared), error(single)


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_less_precise_than_one_process(mode: str, dtype: torch.dtype) -> None:
    for shared, single in run_ranks(4, low_precision, mode, dtype):
        assert shared <= 1.2 * single


def forward_and_backward_by_hand(mode: str) -> float:
    plan = sp.plan(LENGTH, BRANCHES, context(mode))
    q, k, v, dout = (sp.shard(x, plan) for x in random_inputs(LENGTH, 8, 2, 8))
    sinks = torch.linspace(-1, 1, 8, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    out = sp.attention(*leaves[:3], plan, window=20, sinks=leaves[3])
    out.backward(dout)
    again, lse = sp.attention_forward(q, k, v, plan, window=20, sinks=sinks)
    grads = sp.attention_backward(dout, q, k, v, again, lse, plan, window=20, sinks=sinks)
    assert torch.equal(out, again) and lse.shape == (8, plan.local_length)
    half = slice(4, 8), slice(1, 2)  # query heads, and their key head
    held = (q[:, half[0]], k[:, half[1]], v[:, half[1]], again[:, half[0]], lse[half[0]])
    part = sp.attention_backward(
        dout[:, half[0]], *held, plan, window=20, sinks=sinks[half[0]], scale=8**-0.5
    )
    expected = (leaves[0].grad[:, half[0]], leaves[1].grad[:, half[1]], leaves[2].grad[:, half[1]])
    pairs = [
        *((x.grad, g) for x, g in zip(leaves, grads, strict=True)),
        *zip(expected, part[:3], strict=True),
    ]
    return worst((a - b).abs().max() for a, b in pairs)


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_explicit_functions_agree_with_autograd(mode: str) -> None:
    assert max(run_ranks(2, forward_and_backward_by_hand, mode)) <= 1e-14


def test_autocast_is_followed() -> None:
    plan = sp.plan(32, None, sp.SequenceParallel())
    q, k, v, dout = random_inputs(32, 4, 2, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v.bfloat16())]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sp.attention(*leaves, plan)
        out.backward(dout.bfloat16())
    assert out.dtype == torch.bfloat16 and [x.grad.dtype for x in leaves] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]
    again = sp.attention(*(x.detach().bfloat16() for x in leaves), plan)
    assert torch.equal(out, again)


def refused(mode: str, change: str) -> str:
    plan = sp.plan(LENGTH, ONE, context(mode))
    q, k, v, _ = (sp.shard(x, plan) for x in random_inputs(LENGTH, 6, 2, 8))
    kwargs: dict[str, Any] = {}
    if change == "dtype":
        k = k.float()
    elif change == "length":
        q, k, v = q[1:], k[1:], v[1:]
    elif change == "dropout":
        kwargs["dropout_p"] = 0.1
    elif change == "kv heads":
        q = q[:, :5]
    elif change == "sinks":
        kwargs["sinks"] = torch.zeros(5)
    elif change == "window":
        kwargs["window"] = 0
    try:
        sp.attention(q, k, v, plan, **kwargs)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "accepted"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("zigzag-ring", "dtype", "one dtype"),
        ("zigzag-ring", "length", "48 tokens|24 tokens"),
        ("zigzag-ring", "dropout", "attention_dropout: 0"),
        ("zigzag-ring", "kv heads", "5 query heads are not a multiple of 2"),
        ("zigzag-ring", "sinks", "sinks have shape"),
        ("zigzag-ring", "window", "window is 0"),
        ("ulysses", "", "4 ranks cannot share 6 query heads evenly"),
    ],
)
def test_refused_before_any_message(mode: str, change: str, message: str) -> None:
    import re

    for found in run_ranks(4, refused, mode, change):
        assert re.search(message, found), found


def half_of_the_ranks(mode: str) -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 gives up")


@pytest.mark.processes
def test_an_error_on_one_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankError, match="rank 1 gives up"):
        run_ranks(2, half_of_the_ranks, "")
    assert len(run_ranks(2, compare, "zigzag-ring", None, ONE)) == 2, "the pool goes on"
