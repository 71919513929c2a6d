"""Features of images and video frames, from the ranks that compute them to the ranks that hold
their placeholders.

A *part* is what a tower computes by itself: an image, a tile of one, a frame of a video. Parts are
dealt to the ranks of the sequence-parallel group by their cost, and each rank computes its own. One
all-to-all of unequal lengths then carries the rows of features straight to the ranks that hold the
tokens which they replace, and its backward carries the gradients back: no rank holds the features
of all parts, nor a [T, h] tensor. All indices are made on the host, from the row's plan.

Host only but for `Route`: no process group, no device.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Interval
from .pinned import copied
from .plan import RowPlan

BALANCED = 0.95
"""Parts stay in the row's order, a stretch of it for each rank, where the mean load is at least
this share of the largest: a video is then decoded in stretches.
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """`places`: intervals of the row that the part's features replace, one after another, in the
    features' order. `cost`: its work, in any unit. `copies`: further places of the same features,
    of an image that stands in several documents.
    """

    places: tuple[Interval, ...]
    cost: float = 1.0
    copies: tuple[tuple[Interval, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of its features."""
        return sum(stop - start for start, stop in self.places)


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each part: stretches of the row where they are balanced, else the longest
    processing time first. The same answer on every rank.

    Args:
        costs: of the parts, in the row's order.
        ranks: size of the sequence-parallel group.
    """
    stretches = _stretches(costs, ranks)
    if balance(costs, stretches, ranks) >= BALANCED:
        return stretches
    owner = [0] * len(costs)
    heap = [(0.0, rank) for rank in range(ranks)]
    for part in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        owner[part] = rank
        heapq.heappush(heap, (load + costs[part], rank))
    found = [owner, stretches]
    return max(found, key=lambda owners: balance(costs, owners, ranks))


def _stretches(costs: Sequence[float], ranks: int) -> list[int]:
    """Each part by where its middle lies in the sum of all costs."""
    total, before, owner = sum(costs), 0.0, []
    for cost in costs:
        share = (before + cost / 2) / total if total else 0.0
        owner.append(min(ranks - 1, int(share * ranks)))
        before += cost
    return owner


def balance(costs: Sequence[float], owner: Sequence[int], ranks: int) -> float:
    """Mean load of the ranks over the largest: 1 where all have the same."""
    loads = [0.0] * ranks
    for cost, rank in zip(costs, owner, strict=True):
        loads[rank] += cost
    largest = max(loads, default=0.0)
    return sum(loads) / ranks / largest if largest else 1.0


@dataclasses.dataclass(frozen=True)
class Route:
    """Which rows of features this rank sends, and where the rows that it receives belong.

    Attributes:
        group: of the sequence-parallel ranks; None at size 1.
        rows: rows of features of this rank's own parts, laid end to end in the row's order.
        send: which of these rows are sent, destination after destination.
        send_counts, receive_counts: rows for and from each rank of the group.
        places: [received] local positions that the received rows belong to.
        once: no row is sent twice.
        anyone: whether any rank of the group sends anything: if not, nothing is exchanged.
    """

    group: dist.ProcessGroup | None
    rows: int
    send: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    places: Tensor
    anyone: bool
    once: bool = True

    @classmethod
    def make(cls, parts: Sequence[Part], owner: Sequence[int], plan: RowPlan) -> Route:
        """The route of a row's features. Host only.

        Args:
            parts: of the whole row, the same on every rank.
            owner: the rank that computes each part.
            plan: of the row.
        Raises:
            ValueError: a place outside the row, or two features for one token.
        """
        ranks, mine = plan.ctx.size, plan.ctx.rank
        # The row's position of every placeholder, the rank that computes its feature, and the
        # feature's row among that rank's.
        position, source, row = [], [], []
        rows = [0] * ranks
        for part, rank in zip(parts, owner, strict=True):
            for places in (part.places, *part.copies):
                at = rows[rank]
                for start, stop in places:
                    position.append(torch.arange(start, stop))
                    source.append(torch.full((stop - start,), rank))
                    row.append(torch.arange(at, at + stop - start))
                    at += stop - start
                if at - rows[rank] != part.tokens:
                    raise ValueError(
                        f"An image has {part.tokens} placeholders in one document and"
                        f" {at - rows[rank]} in another."
                    )
            rows[rank] += part.tokens
        if not position:
            nothing, none = torch.zeros(0, dtype=torch.int64), (0,) * ranks
            return cls(plan.ctx.group, 0, nothing, none, none, nothing, False)
        where, computed, rows_of = (torch.cat(x) for x in (position, source, row))
        if int(where.min()) < 0 or int(where.max()) >= plan.length:
            raise ValueError(
                f"Placeholders at {int(where.min())} to {int(where.max())}, in a row of"
                f" {plan.length} tokens."
            )
        if len(where.unique()) < len(where):
            raise ValueError("Two images have placeholders at the same token of the row.")
        holder, local = _held(where, plan)
        # Sender and receiver list the rows of one pair of ranks in the row's order.
        order = where.argsort()
        holder, local, computed, rows_of = (x[order] for x in (holder, local, computed, rows_of))
        sent, received = (computed == mine).nonzero()[:, 0], (holder == mine).nonzero()[:, 0]
        sent = sent[holder[sent].argsort(stable=True)]
        received = received[computed[received].argsort(stable=True)]
        return cls(
            plan.ctx.group,
            rows[mine],
            rows_of[sent],
            tuple(torch.bincount(holder[sent], minlength=ranks).tolist()),
            tuple(torch.bincount(computed[received], minlength=ranks).tolist()),
            local[received],
            True,
            not any(part.copies for part in parts),
        )

    def to(self, device: torch.device | str) -> Route:
        """The indices on a device, without waiting for it."""
        moved = {
            name: copied(getattr(self, name), torch.device(device)) for name in ("send", "places")
        }
        return dataclasses.replace(self, **moved)

    def exchange(self, features: Tensor) -> Tensor:
        """[rows + extra, w] features of this rank's parts -> [received, w], of its placeholders, in
        the order of `places`. Differentiable, its backward the exact adjoint; collective over the
        group where any of its ranks has parts.

        Rows beyond `rows` are sent to nobody; their gradient is 0.

        Raises:
            ValueError: another number of features than the placeholders that they are for.
        """
        if len(features) < self.rows:
            raise ValueError(
                f"The tower gave {len(features)} features, the row has {self.rows} placeholders for"
                " them."
            )
        return _Exchange.apply(features, self)


def _held(where: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """The rank that holds each position of the row, and its place among that rank's tokens."""
    runs = sorted(
        (start, rank, offset)
        for rank, intervals in enumerate(plan.layout.intervals)
        for (start, _), offset in zip(
            intervals,
            itertools.accumulate((b - a for a, b in intervals), initial=0),
            strict=False,
        )
    )
    starts, ranks, offsets = (torch.tensor(x) for x in zip(*runs, strict=True))
    run = torch.searchsorted(starts, where, right=True) - 1
    return ranks[run], offsets[run] + where - starts[run]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.rows = route, len(features)
        sent = features.index_select(0, route.send)
        return _all_to_all(sent, route.send_counts, route.receive_counts, route)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        route: Route = ctx.route
        back = _all_to_all(grad, route.receive_counts, route.send_counts, route)
        out = grad.new_zeros(ctx.rows, *grad.shape[1:])
        if route.once:
            return out.index_copy_(0, route.send, back), None
        return out.index_add_(0, route.send, back), None


def _all_to_all(
    x: Tensor, counts: tuple[int, ...], out_counts: tuple[int, ...], route: Route
) -> Tensor:
    if route.group is None or not route.anyone:
        return x
    out = torch.empty((sum(out_counts), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_to_all_single(out, x.contiguous(), list(out_counts), list(counts), group=route.group)
    return out
