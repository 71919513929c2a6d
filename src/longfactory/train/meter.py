"""What a step costs and how far the run is: tokens and model FLOP a second, memory, what waits for
data, what is padding, and the time that is left.

Numbers of a step are sums over data-parallel groups, and travel with the count of its items
(`RowTrainer.get_batch_samples`): no collective of their own. Time is this process's; the ranks of a
step wait for each other.
"""

from __future__ import annotations

import copy
import dataclasses
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from longfactory.data.row import Row
from longfactory.memory.products import document_flop
from longfactory.memory.shapes import GPUS, ModelShape, kind_of
from longfactory.train.loader import RowSampler

RECENT = 20
"""Steps that the rate on the progress bar is of, at most."""
LARGEST_ORDER = 2_000_000
"""Samples whose order is looked at for the tokens that are left; of more the mean is taken."""

SUMS = ("tokens", "length", "room", "flop")
"""What is summed of a step: tokens of documents; tokens of rows, padding included; tokens that
packed rows have room for; FLOP that the model needs.
"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some steps took."""

    steps: int = 0
    seconds: float = 0.0
    """Of the steps themselves, without evaluations and saves."""
    waited: float = 0.0
    """Seconds of them that this process waited for rows."""
    tokens: float = 0.0
    length: float = 0.0
    room: float = 0.0
    flop: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Cost))
        )


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is told of some steps; None for what is not known."""

    tokens_per_second_per_gpu: float | None = None
    """Tokens of documents a second and process."""
    mfu: float | None = None
    """Share of the GPUs' rate by their data sheet, 0 to 1."""
    peak_memory_gib: float | None = None
    """Of the GPU that has most; without GPUs of this process on the host."""
    data_wait: float | None = None
    """Share of the time, 0 to 1."""
    padding: float | None = None
    """Share of the rows' tokens, 0 to 1."""
    packing: float | None = None
    """Share of the packed rows' room that holds tokens, 0 to 1."""
    seconds_per_step: float | None = None

    def known(self) -> dict[str, float]:
        """Those that are known, rounded to four digits."""
        return {
            name: float(f"{value:.4g}")
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        }


class Meter:
    """Counts a run's steps.

    A step: `begin`, `fetched` with its rows, `summed` with their sums, `end`. Its time goes from
    the end of the step before to its own: while the row of the log is written between them, a GPU
    still updates the weights. What is between them and no training is `interrupted`.

    Args:
        world: processes of the run.
        shape: of the model, for its FLOP; None: they are not counted.
        peak: FLOP a second of one GPU by its data sheet; None where it is not known.
        capacity: tokens that a packed sample has room for; None without packing.
    """

    def __init__(
        self,
        world: int = 1,
        shape: ModelShape | None = None,
        peak: float | None = None,
        capacity: int | None = None,
    ):
        self.world, self.shape, self.peak, self.capacity = world, shape, peak, capacity
        self.recent: deque[Cost] = deque(maxlen=RECENT)
        self.since_log = Cost()
        self.total = Cost()
        self.peak_memory = 0.0
        """GiB, of all processes, as it was found when they last compared."""
        self.left = TokensLeft(None)
        self._begun = self._asked = self._waited = 0.0
        self._ended: float | None = None  # the step before, if nothing came between
        self._sums: Sequence[float] = (0.0,) * len(SUMS)
        self._first_ended: float | None = None
        self._tokens_of_first = 0.0

    def begin(self) -> None:
        """A step begins: its rows are asked for."""
        self._asked = time.monotonic()
        self._begun = self._asked if self._ended is None else self._ended

    def fetched(self, rows: Sequence[Row], samples: int) -> list[float]:
        """The rows have come.

        Args:
            rows: of this data-parallel group.
            samples: that they hold; packed ones count once.
        Returns:
            What is to be summed over data-parallel groups (`SUMS`).
        """
        self._waited = time.monotonic() - self._asked
        return [
            float(sum(row.real_tokens for row in rows)),
            float(sum(len(row) for row in rows)),
            float(samples * (self.capacity or 0)),
            0.0 if self.shape is None else sum(row_flop(self.shape, row) for row in rows),
        ]

    def summed(self, sums: Sequence[float]) -> None:
        """The sums over data-parallel groups, on the host."""
        self._sums = sums

    def end(self) -> None:
        """The step is done."""
        now = time.monotonic()
        cost = Cost(1, now - self._begun, self._waited, *self._sums)
        self.recent.append(cost)
        self.since_log += cost
        self.total += cost
        if self._first_ended is None:
            self._first_ended, self._tokens_of_first = now, cost.tokens
        else:  # what is done once comes behind the first step
            self._ended = now

    def interrupted(self) -> None:
        """An evaluation, a save or a new epoch comes before the next step, whose time begins with
        it.
        """
        self._ended = None

    def logged(self) -> None:
        """What follows belongs to the next row of the log."""
        self.since_log = Cost()

    def compare_memory(self, device: torch.device) -> None:
        """Finds the peak of the process that has most. Collective."""
        peak = torch.tensor(own_peak(device), dtype=torch.float64, device=device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        self.peak_memory = float(peak)

    def rates(self, cost: Cost) -> Rates:
        """What is told of some steps."""
        if not cost.steps or cost.seconds <= 0:
            return Rates()
        processes = cost.seconds * self.world
        return Rates(
            tokens_per_second_per_gpu=cost.tokens / processes,
            mfu=cost.flop / processes / self.peak if self.peak and cost.flop else None,
            peak_memory_gib=self.peak_memory or None,
            data_wait=cost.waited / cost.seconds,
            padding=1 - cost.tokens / cost.length if cost.length else None,
            packing=cost.tokens / cost.room if cost.room else None,
            seconds_per_step=cost.seconds / cost.steps,
        )

    def of_recent(self) -> Rates:
        """What is told of the last steps."""
        return self.rates(sum(self.recent, Cost()))

    def remaining(self, step: int, last: int) -> float | None:
        """Seconds from the end of a step to the end of the last one; None where no step is done."""
        mean = self.total.tokens / max(self.total.steps, 1)
        return self.seconds_left(self.left(step, last, mean))

    def seconds_left(self, tokens: float) -> float | None:
        """Until so many more tokens are trained, at the pace since the first step (which compiles
        and measures), evaluations and saves included; of the first step where there is no other.
        """
        if self._first_ended is None or self.total.tokens <= 0:
            return None
        later = self.total.tokens - self._tokens_of_first
        if later <= 0:
            return tokens * self.total.seconds / self.total.tokens
        return tokens * (time.monotonic() - self._first_ended) / later


def row_flop(shape: ModelShape, row: Row) -> float:
    """FLOP that a row's documents need, forward and backward."""
    lengths = [d.stop - d.start for d in row.documents]
    return sum(
        document_flop(
            shape, lengths[i], before=lengths[d.parent] if d.parent >= 0 else 0, heads=d.trained
        )
        for i, d in enumerate(row.documents)
        if d.role != "pad"
    )


def peak_rate(gpu: str | None, width: int, tf32: bool) -> float | None:
    """FLOP a second of a GPU by its data sheet; None for one that is not known.

    Args:
        gpu: its name; None without one.
        width: bytes of a number as layers compute it.
        tf32: fp32 products are computed in TF32.
    """
    kind = None if gpu is None else kind_of(gpu)
    return None if kind is None else GPUS[kind].rate(width, tf32)


def own_peak(device: torch.device) -> float:
    """GiB that this process has held at most: on its GPU, or without one on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class TokensLeft:
    """How many tokens the steps that are left train, by the lengths of their samples.

    Args:
        sampler: of the training samples; None of a stream, whose steps are taken to be like those
            that were.
        lengths: tokens of each sample.
    """

    def __init__(self, sampler: RowSampler | None, lengths: Any = None):
        self.sampler, self.lengths = sampler, None if lengths is None else np.asarray(lengths)
        self._epoch, self._after = -1, np.zeros(1)

    def __call__(self, step: int, last: int, mean: float) -> float:
        """Tokens of the optimizer steps from `step` on (counted from 0) up to `last`.

        Args:
            mean: tokens of a step so far, for a stream.
        """
        if step >= last:
            return 0.0
        if self.sampler is None or self.lengths is None or not len(self.lengths):
            return (last - step) * mean
        size, count = self.sampler.step, self.sampler.length
        steps = count // size if self.sampler.drop_last else -(-count // size)
        epoch, within = divmod(step, max(steps, 1))
        end = min(last - epoch * steps, steps)
        after = self._tokens_after(epoch, steps, size)
        rest = last - (epoch + 1) * steps
        return float(after[within] - after[end]) + max(rest, 0) * float(after[0]) / max(steps, 1)

    def _tokens_after(self, epoch: int, steps: int, size: int) -> np.ndarray:
        """[steps + 1]: tokens of an epoch's steps from each on."""
        assert self.sampler is not None and self.lengths is not None
        if epoch != self._epoch:
            if self.sampler.length > LARGEST_ORDER:
                each = np.full(steps, float(self.lengths.mean()) * size)
            else:
                sampler = copy.copy(self.sampler)
                sampler.set_epoch(epoch)
                order = self.lengths[np.asarray(sampler.order(), dtype=np.int64)].astype(float)
                padded = np.zeros(steps * size)
                padded[: min(len(order), len(padded))] = order[: len(padded)]
                each = padded.reshape(steps, size).sum(1)
            self._after = np.append(np.cumsum(each[::-1])[::-1], 0.0)
            self._epoch = epoch
        return self._after
