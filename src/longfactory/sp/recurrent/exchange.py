"""Recurrences of a row that several ranks share: states are passed along them, or tokens are
exchanged for heads, whichever is expected to take less time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..collectives import all_to_all
from ..pinned import copied
from ..plan import RowPlan
from ..threads import one_thread
from .chunked import recurrence
from .fragments import fragments_of
from .rule import CHUNK, Rule

ATTENTION = 5.7e14
"""FLOP of attention a second, beside which a context's `flop_per_byte` says how fast links are."""
MEMORY = 3e12
"""Bytes of its memory that a rank reads or writes in a second."""
STEP = 5e-6
"""Seconds in which a program takes the states of some columns over one chunk. A stretch's chunks
follow one another, so that a share of the heads over a longer stretch takes longer where there are
few programs. Qwen3.5-9B's 32 heads and 512 chunks take 2.6 ms on a H200."""
PROGRAMS, COLUMNS = 128, 32
"""Programs that run at once, and columns of values of each."""


def over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    rule: Rule,
    plan: RowPlan,
    dtype: torch.dtype,
    skip: Tensor | None = None,
) -> Tensor:
    """See `chunked.recurrence`: by passing states along the ranks, or by exchanging tokens for
    heads, whichever moves less. Collective.
    """
    group = plan.ctx.group
    if group is None or not exchange_is_cheaper(q, v, g, rule, plan):
        return recurrence(q, k, v, g, beta, rule, fragments_of(plan), group, dtype, skip)
    n = plan.ctx.size
    kinds = (q, k, v), (g, beta)
    mine: list[Tensor] = []
    # The ranks' shares of the heads of several tensors, side by side: one exchange carries all.
    for tensors in kinds:
        # [T/n, H, D] or [T/n, H] -> [n, T/n, H/n * D]
        parts = [x.unflatten(1, (n, -1)).flatten(2).transpose(0, 1) for x in tensors]
        received = _to_heads(torch.cat(parts, -1), plan).split([x.shape[2] for x in parts], 1)
        shapes = [(x.shape[1] // n, *x.shape[2:]) for x in tensors]
        mine += [x.unflatten(1, shape) for x, shape in zip(received, shapes, strict=True)]
    q, k, v, g, beta = mine
    if skip is not None:
        skip = skip.unflatten(0, (n, -1))[plan.ctx.rank]
    out = recurrence(q, k, v, g, beta, rule, fragments_of(plan, whole=True), None, dtype, skip)
    return _to_rows(out, plan)


def exchange_is_cheaper(q: Tensor, v: Tensor, g: Tensor, rule: Rule, plan: RowPlan) -> bool:
    """Whether each rank should run a share of the heads over the whole row. The same on every rank
    of the group.
    """
    if q.shape[1] % plan.ctx.size or not fragments_of(plan).open:
        return False
    return exchange_seconds(q, v, g, plan) < passing_seconds(q, v, rule, plan)


def exchange_seconds(q: Tensor, v: Tensor, g: Tensor, plan: RowPlan) -> float:
    """Of a forward and a backward pass by an exchange of heads: messages, what is laid out for
    them, and the passes over states, of which there are three."""
    n, (tokens, keys, dim), (_, heads, value_dim) = plan.ctx.size, q.shape, v.shape
    sent = tokens * (2 * keys * dim + 2 * heads * value_dim) * v.element_size()
    sent += 4 * (g.numel() + tokens * heads)
    messages = 2 * sent * (n - 1) / n * plan.ctx.flop_per_byte / ATTENTION
    whole = (f.length for f in fragments_of(plan, whole=True).every)
    # each way it is read and written twice
    return messages + 8 * sent / MEMORY + 3 * _scan_seconds(whole, heads // n, value_dim)


def passing_seconds(q: Tensor, v: Tensor, rule: Rule, plan: RowPlan) -> float:
    """The same by passing states along the ranks, of the rank that takes longest: stretches that
    others start from are passed over again, twice forward for deltas, and once backward.
    """
    n, (_, heads, value_dim), dim = plan.ctx.size, v.shape, q.shape[2]
    fragments, delta = fragments_of(plan), rule.kind == "delta"
    states = fragments.width * n * heads * dim * (value_dim + (dim if delta else 0)) * 4
    messages = 2 * states * plan.ctx.flop_per_byte / ATTENTION
    seconds = []
    for rank in range(n):
        lengths = (f.length for f in fragments.every if f.rank == rank)
        opened = (fragments.every[i] for i in fragments.open)
        again = (f.length for f in opened if f.rank == rank)
        seconds.append(
            3 * _scan_seconds(lengths, heads, value_dim)
            + (3 if delta else 2) * _scan_seconds(again, heads, value_dim)
        )
    return messages + max(seconds)


def _scan_seconds(lengths: Iterable[int], heads: int, value_dim: int) -> float:
    """Of one pass over the states of stretches of so many tokens."""
    chunks = [-(-length // CHUNK) for length in lengths]
    programs = heads * -(-value_dim // COLUMNS)
    return STEP * max(max(chunks, default=0), sum(chunks) * programs / PROGRAMS)


def _order(plan: RowPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T] positions of the ranks' tokens laid end to end, and the inverse. Copied to the device
    once for all layers.
    """
    held = fragments_of(plan).orders
    if device not in held:
        with one_thread():
            stretches = [torch.arange(a, b) for runs in plan.layout.intervals for a, b in runs]
            order = torch.cat(stretches)
            held[device] = (copied(order, device), copied(order.argsort(), device))
    return held[device]


class _Permuted(torch.autograd.Function):
    """Rows in another order. index_select's own backward adds up rows by atomic operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _to_heads(x: Tensor, plan: RowPlan) -> Tensor:
    """[n, T/n, C] -> [T, C]: part r of each token goes to rank r; rows in natural order."""
    order, inverse = _order(plan, x.device)
    received: Tensor = all_to_all(x, plan.ctx.group).flatten(0, 1)
    return _Permuted.apply(received, inverse, order)  # type: ignore[no-any-return]


def _to_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """[T, H/n, D] -> [T/n, H, D]: the way back."""
    n, (order, inverse) = plan.ctx.size, _order(plan, x.device)
    sent = _Permuted.apply(x, order, inverse).unflatten(0, (n, plan.local_length))
    # [n, T/n, H/n, D] -> [T/n, n * H/n, D]
    return all_to_all(sent, plan.ctx.group).transpose(0, 1).flatten(1, 2)
