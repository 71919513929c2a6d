"""For `auto`: the schedules that a row could have, timed on the spot. The fastest on the slowest
rank is kept for rows of its class.

A cost model does not know a machine's links, kernels and clocks well enough to tell schedules apart
that differ by a few percent; a few passes of one layer's attention do. Rows of one class
(`schedules.choose.row_class`) are measured once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import attention_backward, attention_forward
from .context import SequenceParallel, alignment
from .layout import Segment
from .plan import RowPlan
from .schedules.choose import LONGEST, Candidate, candidates, choice_of, row_class

log = logging.getLogger(__name__)

CLASSES = 8
"""So many classes are measured in a run; rows of others go by the rule."""
ROUNDS = 3
PASSES = 0.04
MOST_PASSES = 8
"""Shorter steps are timed some at a time, until they take so many seconds: a single one would be
timed with the host's work before its first kernel, which in a model the layers before it hide.
"""
SECONDS = 1.0
"""What the timed rounds of a class may take. Long rows, whose times scatter less, have two."""
EQUAL = 0.01
"""Of candidates that are as fast within this share the first one is taken, so that the same run
chooses the same more often.
"""


@dataclasses.dataclass
class Measure:
    """Called with a row before its plan is made, by all ranks of a sequence-parallel group. Sets
    `ctx.measured` for the row's class.

    Args:
        head_dim, v_head_dim, dtype: of the model's attention. Head counts are the context's.
        seconds: what times a function; by default a clock around it, with the device synchronised.
    """

    ctx: SequenceParallel
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    seconds: Callable[[Callable[[], object]], float] | None = None

    def __call__(self, length: int, segments: Sequence[Segment]) -> None:
        ctx = self.ctx
        if ctx.mode != "auto" or ctx.size == 1 or ctx.heads is None or len(ctx.measured) >= CLASSES:
            return
        # Sums in the order in which ranks come in cannot be had twice either way, and then the
        # choice should be the same, too.
        if torch.are_deterministic_algorithms_enabled():
            return
        kind = row_class(length, segments)
        if kind in ctx.measured:
            return
        unit = alignment(ctx)
        tokens = min(length, LONGEST // unit * unit)
        times = self._times(tokens, cut(segments, tokens), candidates(ctx, length))
        fastest = min(times.values())
        chosen = next(c for c, t in times.items() if t <= (1 + EQUAL) * fastest)
        ctx.measured[kind] = chosen
        if ctx.rank == 0 and ctx.dp_rank == 0:
            found = ", ".join(
                f"{c.name(ctx.size)} {1e3 * t:.1f} ms"
                for c, t in sorted(times.items(), key=lambda item: item[1])
            )
            log.info(
                "sequence parallelism, rows like this one of %d tokens: measured time per "
                "layer: %s",
                length,
                found,
            )

    def _times(
        self, length: int, segments: tuple[Segment, ...], names: list[Candidate]
    ) -> dict[Candidate, float]:
        """Seconds of each candidate in `names`, forward and backward, on the slowest rank: the same
        on every rank.
        """
        ctx = self.ctx
        tensors = self._tensors(length // ctx.size)
        plans = [
            RowPlan(length, segments, ctx, choice_of(c, ctx.size, length, segments)) for c in names
        ]
        steps: list[Callable[[], object]] = [
            functools.partial(forward_backward, plan, *tensors) for plan in plans
        ]
        clock = self.seconds or self._clock
        for step in steps:  # builds kernels and connections
            clock(step)
        found = [[clock(step) for step in steps]]
        passes = int(PASSES / max(1e-9, min(self._slowest(found[0]))))
        if passes > 1:  # as layers follow each other: the host is ahead of the device
            steps = [functools.partial(repeated, step, min(passes, MOST_PASSES)) for step in steps]
            found = [[clock(step) for step in steps]]
        rounds = round(SECONDS / max(1e-9, sum(self._slowest(found[0]))))
        # in turn: a GPU's clock falls as it grows warm
        while len(found) < min(ROUNDS, max(2, rounds)):
            found.append([clock(step) for step in steps])
        # of two the faster one: what else the machine did slowed the other
        medians = [statistics.median_low(times) for times in zip(*found, strict=True)]
        return dict(zip(names, self._slowest(medians), strict=True))

    def _slowest(self, times: list[float]) -> list[float]:
        """Each time on the rank where it is largest."""
        found = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.ctx.group)
        return found.tolist()

    def _tensors(self, rows: int) -> list[Tensor]:
        """q, k, v and dout of this rank, random."""
        heads, kv_heads = self.ctx.heads, self.ctx.kv_heads or self.ctx.heads
        assert heads is not None and kv_heads is not None
        generator = torch.Generator(self.device).manual_seed(self.ctx.rank)
        shapes = (
            (heads, self.head_dim),
            (kv_heads, self.head_dim),
            (kv_heads, self.v_head_dim),
            (heads, self.v_head_dim),
        )
        return [
            torch.randn(rows, *shape, device=self.device, generator=generator).to(self.dtype)
            for shape in shapes
        ]

    def _clock(self, step: Callable[[], object]) -> float:
        self._synchronize()
        dist.barrier(group=self.ctx.group)
        began = time.perf_counter()
        step()
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def repeated(step: Callable[[], object], times: int) -> None:
    """The same step so many times."""
    for _ in range(times):
        step()


def forward_backward(plan: RowPlan, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
    """One layer's attention."""
    out, lse = attention_forward(q, k, v, plan)
    return attention_backward(dout, q, k, v, out, lse, plan)


def cut(segments: Sequence[Segment], length: int) -> tuple[Segment, ...]:
    """The segments of the first `length` tokens."""
    return tuple(
        dataclasses.replace(s, stop=min(s.stop, length)) for s in segments if s.start < length
    )
