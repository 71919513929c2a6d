"""Attention of a sharded row over chosen keys: every query has its own few.

Keys and values are gathered over the sequence-parallel group, some heads at a time; each rank
computes its own queries, in chunks, over the keys of their document and leaves out those that were
not chosen. Gradients of keys and values go back by a reduce-scatter in the wide type. Nothing of a
chunk is stored: the backward pass computes it again.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import probe, replay
from .collectives import raw_all_gather, raw_reduce_scatter
from .layout import Interval
from .plan import RowPlan
from .tiles import runs

GATHERED = 1 << 30
"""Bytes of gathered keys and values that are held at once; those of one key head at least."""
WORKSPACE = 1 << 28
"""Bytes of the scores of a chunk of queries, or of its mask where scores are not stored; those of
one query at least."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive queries of one document that a rank holds side by side.

    Attributes:
        rows: in the rank's local order.
        first: position in the document of the first one.
        length: tokens of the document, those of its parents included.
        keys: where they lie in the row, in the order of positions.
    """

    rows: slice
    first: int
    length: int
    keys: tuple[Interval, ...]

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def of(self, x: Tensor) -> Tensor:
        """The rows of the document: [T, ...] -> [length, ...]."""
        parts = [x[a:b] for a, b in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add_to(self, x: Tensor, part: Tensor) -> None:
        """Adds to the document's first rows in place: x [T, ...], part [at most length, ...]."""
        at = 0
        for a, b in self.keys:
            count = min(b - a, len(part) - at)
            if count <= 0:
                return
            x[a : a + count] += part[at : at + count]
            at += count

    def chunks(self, size: int) -> Iterator[tuple[slice, slice]]:
        """(local rows, positions in the document) of at most `size` queries at a time."""
        for start in range(self.rows.start, self.rows.stop, size):
            stop = min(start + size, self.rows.stop)
            at = self.first + start - self.rows.start
            yield slice(start, stop), slice(at, at + stop - start)


_stretches: weakref.WeakKeyDictionary[RowPlan, tuple[Stretch, ...]] = weakref.WeakKeyDictionary()


def stretches_of(plan: RowPlan) -> tuple[Stretch, ...]:
    """The queries of this rank, in local order.

    Raises:
        ValueError: a segment's tokens see each other in both directions.
    """
    if plan not in _stretches:
        _stretches[plan] = tuple(_stretches_of(plan))
    return _stretches[plan]


def _stretches_of(plan: RowPlan) -> Iterator[Stretch]:
    if any(s.block for s in plan.segments):
        raise ValueError(
            "The row has tokens that see each other in both directions, and sparse attention"
            " chooses among earlier keys only."
        )
    for run in runs(plan.layout.intervals[plan.ctx.rank]):
        for number, segment in enumerate(plan.segments):
            start, stop = max(run.start, segment.start), min(run.stop, segment.stop)
            if start >= stop:
                continue
            keys = _chain(plan, number)
            length = sum(b - a for a, b in keys)
            at = run.offset + start - run.start
            first = length - (segment.stop - start)
            yield Stretch(slice(at, at + stop - start), first, length, keys)


def _chain(plan: RowPlan, number: int) -> tuple[Interval, ...]:
    """A segment and those before it in its document, first to last. Neighbours are one interval."""
    found: list[Interval] = []
    while number >= 0:
        segment = plan.segments[number]
        if found and segment.stop == found[-1][0]:
            found[-1] = (segment.start, found[-1][1])
        elif segment.stop > segment.start:
            found.append((segment.start, segment.stop))
        number = segment.parent
    return tuple(reversed(found))


def longest_document(plan: RowPlan) -> int:
    """Tokens of the row's longest document, its parents included. The same on every rank."""
    lengths: list[int] = []
    for segment in plan.segments:
        parent = lengths[segment.parent] if segment.parent >= 0 else 0
        lengths.append(parent + segment.stop - segment.start)
    return max(lengths)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The keys of each query.

    Attributes:
        indices: [S, T/n, K], one choice for H / S heads each; positions in the query's document, in
            units of `block` keys. -1 is none. Later keys than the query may be among them, and are
            not seen.
        block: consecutive keys that are chosen together.
    """

    indices: Tensor
    block: int = 1

    def mask(self, rows: slice, positions: slice) -> Tensor:
        """[S, queries, keys] bool, of the keys up to the last query's position: what is seen."""
        picks = self.indices[:, rows].long()
        keys = positions.stop
        units = -(-keys // self.block)
        # What is not there, or later, goes into a column of its own.
        picks = torch.where((picks < 0) | (picks >= units), units, picks)
        seen = picks.new_zeros((*picks.shape[:2], units + 1), dtype=torch.bool)
        seen.scatter_(-1, picks, True)
        seen = seen[..., :units]
        if self.block > 1:
            seen = seen.repeat_interleave(self.block, -1)[..., :keys]
        at = torch.arange(positions.start, positions.stop, device=picks.device)
        return seen & (torch.arange(keys, device=picks.device) <= at[:, None])


@dataclasses.dataclass(frozen=True)
class _Call:
    plan: RowPlan
    choices: int
    block: int
    scale: float
    heads: int
    """Key heads that are gathered at once."""
    fused: bool
    """Whether a kernel computes a chunk without storing its scores."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RowPlan,
    chosen: Chosen,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T over the chosen keys) v, for this rank's queries. Collective over the
    sequence-parallel group, whatever the schedule of other layers.

    Args:
        q: [T/n, H, D]. k: [T/n, Hk, D]. v: [T/n, Hk, Dv]. One dtype; H a multiple of Hk.
        chosen: no gradient goes to it.
        sinks: [H], one more score for each head that takes probability and gives nothing.

    Returns:
        [T/n, H, Dv], in q's dtype; under autocast in autocast's.

    Raises:
        ValueError: shapes, dtypes or head counts that do not fit, before any message is sent.
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    heads = _check(q, k, v, plan, chosen, sinks)
    if (seen := probe.current()) is not None:
        seen.arrived[seen.layer].add(probe.settings(scale, None, None, None, sinks))
    with torch.autocast(kind, enabled=False):
        fused = sinks is None and _is_fused(q, v)
        sets = len(chosen.indices)
        call = _Call(plan, sets, chosen.block, float(scale), heads, fused)
        return _Attention.apply(q, k, v, sinks, chosen.indices, call)


def _is_fused(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's memory-efficient kernel takes a mask with these."""
    return (
        q.is_cuda
        and q.dtype != torch.float64
        and q.shape[2] % 8 == v.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(q.device)[0] >= 8
        and not torch.are_deterministic_algorithms_enabled()  # it adds gradients in any order
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, plan: RowPlan, chosen: Chosen, sinks: Tensor | None
) -> int:
    """Returns the number of key heads that are gathered at once, the same on every rank."""
    local, heads, kv_heads = plan.local_length, q.shape[1], k.shape[1]
    if q.shape[0] != local or k.shape[:2] != v.shape[:2] or k.shape[0] != local:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: the plan gives this rank"
            f" {local} tokens."
        )
    sets, queries, _ = chosen.indices.shape
    if queries != local:
        raise ValueError(f"Keys are chosen for {queries} queries, this rank has {local}.")
    if kv_heads == 0 or heads % kv_heads or kv_heads % sets:
        raise ValueError(
            f"{heads} query heads, {kv_heads} key heads and {sets} choices: each must be a multiple"
            " of the next."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}. Attention needs one dtype.")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks have shape {tuple(sinks.shape)}, needed ({heads},).")
    each = plan.length * (k.shape[2] + v.shape[2]) * k.element_size()
    most = min(kv_heads // sets, max(1, GATHERED // each))
    return max(n for n in range(1, most + 1) if (kv_heads // sets) % n == 0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        indices: Tensor,
        call: _Call,
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(q, k, v, sinks, indices)
        if (replayed := replay.kept()) is not None:
            return replayed[0]
        out = q.new_empty((*q.shape[:2], v.shape[2]))
        for part in _parts(q.shape[1], k.shape[1], call):
            keys, values = (_gathered(x[:, part.keys], call.plan) for x in (k, v))
            mine = None if sinks is None else sinks[part.queries]
            for piece in _pieces(part, indices, call):
                out[piece.rows, part.queries] = _softmax(
                    q[piece.rows, part.queries],
                    piece.stretch.of(keys)[: piece.seen],
                    piece.stretch.of(values)[: piece.seen],
                    piece.mask,
                    call,
                    mine,
                )
        replay.record(out, out.new_empty(0))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, indices = ctx.saved_tensors
        call: _Call = ctx.call
        plan = call.plan
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(q.shape[1], k.shape[1], call):
                keys, values = (_gathered(x[:, part.keys], plan) for x in (k, v))
                gathered = [torch.zeros_like(x, dtype=wide) for x in (keys, values)]
                for piece in _pieces(part, indices, call):
                    some_q = q[piece.rows, part.queries].detach().requires_grad_()
                    some_k = piece.stretch.of(keys)[: piece.seen].detach().requires_grad_()
                    some_v = piece.stretch.of(values)[: piece.seen].detach().requires_grad_()
                    leaves = [some_q, some_k, some_v]
                    mine = None
                    if sinks is not None:
                        mine = sinks[part.queries].detach().requires_grad_()
                        leaves.append(mine)
                    with torch.enable_grad():
                        out = _softmax(some_q, some_k, some_v, piece.mask, call, mine)
                    grads = torch.autograd.grad(out, leaves, dout[piece.rows, part.queries])
                    dq[piece.rows, part.queries] = grads[0]
                    for total, grad in zip(gathered, grads[1:3], strict=True):
                        piece.stretch.add_to(total, grad)
                    if dsinks is not None:
                        dsinks[part.queries] += grads[3]
                dk[:, part.keys], dv[:, part.keys] = (_given_back(x, plan) for x in gathered)
        if dsinks is not None:
            dsinks = dsinks.to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None


@dataclasses.dataclass(frozen=True)
class _Part:
    """Heads that are computed together."""

    queries: slice
    keys: slice
    choice: slice
    """The choice of theirs, of `Chosen.indices`."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A chunk of queries: local rows, the keys up to the last one's, and which of them are seen."""

    stretch: Stretch
    rows: slice
    seen: int
    mask: Tensor


def _parts(heads: int, kv_heads: int, call: _Call) -> Iterator[_Part]:
    group, each = heads // kv_heads, kv_heads // call.choices
    for start in range(0, kv_heads, call.heads):
        stop = start + call.heads
        choice = start // each
        yield _Part(
            slice(start * group, stop * group), slice(start, stop), slice(choice, choice + 1)
        )


def _pieces(part: _Part, indices: Tensor, call: _Call) -> Iterator[_Piece]:
    chosen = Chosen(indices[part.choice], call.block)
    heads = 1 if call.fused else part.queries.stop - part.queries.start
    for stretch in stretches_of(call.plan):
        size = max(1, WORKSPACE // (4 * heads * (stretch.first + len(stretch))))
        for rows, positions in stretch.chunks(size):
            yield _Piece(stretch, rows, positions.stop, chosen.mask(rows, positions))


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, call: _Call, sinks: Tensor | None
) -> Tensor:
    """q [c, H, D], k [L, Hk, D], v [L, Hk, Dv], mask [1, c, L] -> [c, H, Dv]."""
    group = q.shape[1] // k.shape[1]
    # [L, Hk, D] -> [H, L, D]
    k, v = (x.transpose(0, 1) for x in (k, v))
    if group > 1:
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    q = q.transpose(0, 1)
    if sinks is None:
        kernel = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if call.fused else nullcontext()
        with kernel:
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], mask[None], scale=call.scale
            )
        return out[0].transpose(0, 1)
    scores = (q @ k.transpose(1, 2) * call.scale).masked_fill(~mask, float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sink = sinks[:, None, None].to(wide).expand(-1, len(q[0]), 1)
    weights = torch.cat([scores.to(wide), sink], -1).softmax(-1)[..., :-1]
    return (weights.to(v.dtype) @ v).transpose(0, 1)


def _order(plan: RowPlan) -> list[Interval]:
    """Intervals of the row, rank after rank."""
    return [interval for intervals in plan.layout.intervals for interval in intervals]


def _gathered(x: Tensor, plan: RowPlan) -> Tensor:
    """[T/n, ...] of every rank -> [T, ...] in natural order."""
    if plan.ctx.group is None:
        return x
    parts = raw_all_gather(x, plan.ctx.group)
    return torch.cat([parts[at : at + b - a] for at, a, b in plan._natural_runs])


def _given_back(x: Tensor, plan: RowPlan) -> Tensor:
    """[T, ...] of every rank, in natural order -> the sum over ranks of this rank's rows."""
    if plan.ctx.group is None:
        return x
    return raw_reduce_scatter(torch.cat([x[a:b] for a, b in _order(plan)]), plan.ctx.group)
