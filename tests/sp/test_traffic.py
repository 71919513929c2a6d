"""Bytes that a schedule moves besides its kernels and messages: every pass over memory is one that
the arithmetic needs.

In units of q, the bytes of one rank's queries, and kv, the bytes of its keys (or values), both in
bfloat16.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longfactory import sp
from longfactory.sp import bulk, kernels, merge
from longfactory.sp.schedules import ring

HEADS, KV_HEADS, DIM, LOCAL = 14, 2, 16, 512
Q, KV = LOCAL * HEADS * DIM * 2, LOCAL * KV_HEADS * DIM * 2


class Traffic(TorchDispatchMode):
    """Counts bytes read and written, but for attention kernels, views and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name, arguments = str(function), function._schema.arguments
        views = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
        if not (
            views or "flash_attention" in name or name.startswith(("aten.empty", "aten.detach"))
        ):
            read = (
                []
                if name.startswith(("aten.zero_", "aten.fill_"))
                else [*args, *(v for k, v in (kwargs or {}).items() if k != "out")]
            )
            if name.startswith("aten.copy_"):
                read = [args[1]]
            self.bytes += sum(
                x.numel() * x.element_size()
                for x in tree_leaves([read, out])
                if isinstance(x, Tensor)
            )
        return out

    def add(self, *tensors: Tensor) -> None:
        self.bytes += sum(x.numel() * x.element_size() for x in tensors)


class Loopback:
    """A message that comes back to its sender."""

    def __init__(self, buffer: Tensor, *_: Any) -> None:
        self.buffer = buffer

    def wait(self) -> Tensor:
        return self.buffer


def traffic(plan: sp.RowPlan, patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    plain = merge.merge_

    def fused(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            plain(out, lse, block_out, block_lse)
        # as the Triton kernel: read both, write one
        counter.add(out, out, lse, lse, block_out, block_lse)

    patch.setattr(merge, "merge_", fused)
    patch.setattr(ring, "Exchange", Loopback)
    shapes = [(LOCAL, HEADS, DIM), (LOCAL, KV_HEADS, DIM), (LOCAL, KV_HEADS, DIM)]
    leaves = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    dout = torch.randn(shapes[0], dtype=torch.bfloat16)
    counter = Traffic()
    # Before its first tile a kernel is tested: that is not counted.
    torch.autograd.grad(sp.attention(*leaves, plan), leaves, dout)
    with (counter := Traffic()):
        out = sp.attention(*leaves, plan)
    forward = counter.bytes
    with counter:
        torch.autograd.grad(out, leaves, dout)
    return forward, counter.bytes - forward


def test_ring_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank whose second tile has all queries and half of the other rank's keys."""
    plan = sp.plan(2 * LOCAL, None, sp.SequenceParallel(2, 1))
    forward, backward = traffic(plan, monkeypatch)
    lse = 3 * 4 * LOCAL * HEADS
    assert forward == 4 * KV + 3 * Q + lse, "keys packed; two blocks read, one written"
    # dq: two blocks read, one written, bfloat16. dk, dv: half written and half zeroed in float32;
    # own ones added and rounded.
    assert backward == 4 * KV + 3 * Q + 2 * (KV // 2 + KV + KV) + 2 * (2 * KV + KV + KV)


def test_packed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that have kernel calls of their own: each result is put in its place once."""
    monkeypatch.setattr(bulk, "SMALLEST", 8)
    monkeypatch.setattr(bulk, "unit", lambda *_: 1)  # squares as long as their documents
    monkeypatch.setattr(kernels, "bulk", lambda *_: True)
    edges = [0, 128, 200, 384, LOCAL]
    plan = sp.plan(
        LOCAL, [sp.Segment(a, b) for a, b in itertools.pairwise(edges)], sp.SequenceParallel()
    )
    assert len(plan.mask().tiles(0, bulk=True)) == 4
    forward, backward = traffic(plan, monkeypatch)
    valid = 4 * LOCAL * HEADS
    assert forward == 2 * Q + 2 * valid
    assert backward == 2 * Q + 2 * (2 * KV), "dq, dk and dv: put in place"
