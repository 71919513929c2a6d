"""Losses and gradients that are no numbers: found on all ranks before the update of the weights.

What it costs: one all-reduce of three numbers and one read of them (`tolist`) a step, after the
step's last backward has been queued and before its update is. Nothing is read between
micro-batches. The read waits for the device, so that the host queues the update's kernels after the
backward instead of ahead of it; AdamW on the host waits there anyway, for the norm.

Where the update comes with the backward (DeepSpeed's engine, `optimizer_overlap`, optimizers that
work layer by layer), the check comes after it: the run ends before anything is saved, and the step
cannot be left out (`config.checks` refuses `on_nan: skip`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory.data.row import Row
from longfactory.errors import UserError
from longfactory.memory.optimizer import local
from longfactory.train.ranks import from_all, is_distributed

log = logging.getLogger("longfactory")

WINDOW, LEAST = 100, 20
"""Steps whose median a spike is measured from: at most, and at least."""
SPIKE = 8.0
"""Robust z-score from which on a loss or a gradient's norm is reported."""
SKIPS = 40
"""Steps in a row without an update after which the run ends. fp16's scale begins at 2^16 and is
halved each time: then it is 2^-24, and no gradient is in range.
"""
NAMED = 5
"""Rows, or parameters, that a message names."""


class Numbers:
    """Checks a step's losses and the norm of its gradient, and reports spikes.

    A step: `begin` with its rows, `add` after each micro-batch, `may_update` before the update.

    Args:
        on_nan: what a NaN or Inf does: "stop" ends the run, "skip" leaves the update out.
        where: gives a sample's data set in words, and its row (from 0), by the sample's number.
        scaled: gradients are scaled by a GradScaler (fp16), which looks for a scale that is in
            range by leaving out updates. Those are counted apart, and are no error.
    """

    def __init__(
        self,
        on_nan: Literal["stop", "skip"],
        where: Callable[[int], tuple[str, int]],
        scaled: Callable[[], bool] = lambda: False,
    ):
        self.on_nan, self.where, self.scaled = on_nan, where, scaled
        self.skipped = 0
        """Updates that were left out because of a NaN or Inf."""
        self._in_a_row = 0
        self._rows: Sequence[Row] = ()
        self._losses: list[Tensor] = []
        self._spikes = {"loss": Spikes(), "gradient norm": Spikes()}

    def begin(self, rows: Sequence[Row]) -> None:
        """A step begins, with these rows on the host."""
        self._rows, self._losses = rows, []

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch, [] on the device; it is not read."""
        self._losses.append(loss.detach())

    def may_update(self, step: int, norm: Any, model: nn.Module) -> bool:
        """Whether the weights may be updated. Collective; every rank is told the same.

        Args:
            step: the optimizer step, from 1.
            norm: of the whole gradient: a number, a tensor, or None where it is not known.
            model: names the parameters whose gradients are no numbers.
        Raises:
            UserError: a loss or a gradient is NaN or Inf, and `on_nan` is "stop"; or too many
                updates in a row were left out. On every rank.
        """
        bad_losses, loss, norm_value = self._read(norm)
        if not bad_losses and (norm is None or math.isfinite(norm_value)):
            self._in_a_row = 0
            self._tell_spikes(step, {"loss": loss, "gradient norm": norm_value})
            return True
        self._in_a_row += 1
        scaler = not bad_losses and self.scaled()
        left_out = scaler or self.on_nan == "skip"
        if left_out and self._in_a_row >= SKIPS:
            raise UserError(self._too_many(step, scaler, model))
        if scaler:
            return True  # the scaler leaves it out by itself, and lowers the scale
        what = self._describe(bad_losses > 0, model)
        if not left_out:
            raise UserError(
                f"Step {step}: {what} The weights were not saved after it. Check these rows, "
                "lower learning_rate, or set on_nan: skip to skip such updates."
            )
        self.skipped += 1
        log.warning(
            f"Step {step}: {what} The update is skipped (on_nan: skip; {self.skipped} so far)."
        )
        return False

    def _read(self, norm: Any) -> tuple[float, float, float]:
        """Number of ranks with a loss that is no number, the mean of the ranks' losses, and the
        norm; nan where it is not known. Collective.

        Every rank decides by these numbers, the largest norm among them, so that all decide alike.
        """
        device = self._losses[0].device if self._losses else torch.device("cpu")
        total = torch.zeros((), dtype=torch.float64, device=device)
        for loss in self._losses:
            total = total + loss.to(torch.float64)
        if not isinstance(norm, Tensor):
            norm = torch.tensor(math.nan if norm is None else norm)
        known = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        known = known.detach().to(device=device, dtype=torch.float64).reshape(())
        bad_norm = (~torch.isfinite(known)).to(torch.float64)
        bad_loss = (~torch.isfinite(total)).to(torch.float64)
        found = torch.stack([bad_loss, bad_norm, total])
        ranks = 1
        if is_distributed():
            dist.all_reduce(found)
            ranks = dist.get_world_size()
        bad_losses, bad_norms, losses, value = torch.cat([found, known[None]]).tolist()
        return bad_losses, losses / ranks, math.nan if bad_norms else value

    def _tell_spikes(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            score, median = self._spikes[name].score(value)
            if score > SPIKE:
                log.warning(
                    f"Step {step}: the {name} is {value:.4g}, a spike: the median of the steps"
                    f" before is {median:.4g} (robust z-score {score:.0f}). This process read"
                    f" {self._names()}."
                )

    def _describe(self, of_loss: bool, model: nn.Module) -> str:
        """What is no number, and where. Collective."""
        mine = None
        total = float(sum(self._losses)) if self._losses else 0.0
        if not of_loss or not math.isfinite(total):
            mine = (total, self._names())
        found = [(rank, *x) for rank, x in enumerate(from_all(mine)) if x is not None]
        rows: dict[str, int] = {}
        for rank, _, names in found:  # ranks of a group read the same rows
            rows.setdefault(names, rank)
        places = "; ".join(f"rank {rank}: {names}" for names, rank in list(rows.items())[:NAMED])
        if of_loss:
            kind = "nan" if any(math.isnan(loss) for _, loss, _ in found) else "inf"
            return f"the loss is {kind} ({places})."
        names = [n for n, p in model.named_parameters() if not _finite_gradient(p)][:NAMED]
        them = f" of {', '.join(names)}" if names else ""
        return f"the gradient{them} holds NaN or Inf, although the loss is finite ({places})."

    def _too_many(self, step: int, scaler: bool, model: nn.Module) -> str:
        if scaler:
            return (
                f"Step {step}: {SKIPS} updates in a row were left out, because fp16 gradients were"
                " NaN or Inf at every scale. Use bf16: true, or lower learning_rate. Last:"
                f" {self._describe(False, model)}"
            )
        return (
            f"Step {step}: {SKIPS} updates in a row were left out (on_nan: skip): the weights or"
            " the data are no longer usable. Go on from an earlier checkpoint with a lower"
            " learning_rate."
        )

    def _names(self) -> str:
        """Data sets and rows of this process's micro-batches."""
        samples = dict.fromkeys(d.sample for r in self._rows for d in r.documents if d.sample >= 0)
        rows: dict[str, list[int]] = {}
        for sample in list(samples)[:NAMED]:
            data_set, row = self.where(sample)
            rows.setdefault(data_set, []).append(row)
        names = [f"{name}, row {', '.join(map(str, numbers))}" for name, numbers in rows.items()]
        more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
        return ("; ".join(names) or "no sample") + more


@dataclasses.dataclass
class LoggedSteps:
    """What transformers' means over steps must leave out: it divides by all of them.

    Attributes:
        all, skipped: steps since the last log line, and those without an update.
        before: the sum of losses, the metrics and the stage's fields before this step.
    """

    all: int = 0
    skipped: int = 0
    before: Any = None
    _run: tuple[int, int] = (0, 0)

    def counts(self) -> list[int]:
        """[all, skipped, those of all log lines before], for a checkpoint."""
        return [self.all, self.skipped, *self._run]

    def set_counts(self, counts: Sequence[int]) -> None:
        """Goes on from `counts`."""
        self.all, self.skipped, *run = counts
        self._run = (run[0], run[1])

    def correct(self, logs: dict[str, Any], skipped_updates: int) -> None:
        """The loss as a mean over the steps that made an update; without any, no loss."""
        if "loss" in logs:
            self._run = (self._run[0] + self.all, self._run[1] + self.skipped)
            _rescale(logs, "loss", self.all, self.skipped)
            if not math.isfinite(logs.get("grad_norm") or 0.0) and self.skipped:
                del logs["grad_norm"]
            self.all = self.skipped = 0
            if skipped_updates:
                logs["skipped_updates"] = skipped_updates
        elif "train_loss" in logs:
            _rescale(logs, "train_loss", self._run[0] + self.all, self._run[1] + self.skipped)


def _rescale(logs: dict[str, Any], name: str, steps: int, skipped: int) -> None:
    if steps == skipped and skipped:
        del logs[name]
    elif skipped:
        logs[name] *= steps / (steps - skipped)


def _finite_gradient(p: nn.Parameter) -> bool:
    grad = None if p.grad is None else local(p.grad)
    return grad is None or bool(torch.isfinite(grad).all())


@dataclasses.dataclass
class Spikes:
    """Robust z-scores: how far a number is above the median of those before it, in median absolute
    deviations (scaled so that of a normal distribution they are standard deviations).
    """

    values: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=WINDOW))

    def score(self, value: float) -> tuple[float, float]:
        """The score of a number, which is then one of those before, and their median; 0 where these
        are fewer than `LEAST`.
        """
        if not math.isfinite(value):
            return 0.0, value
        score, median = 0.0, value
        if len(self.values) >= LEAST:
            median = statistics.median(self.values)
            deviation = statistics.median(abs(v - median) for v in self.values)
            # Numbers that are all but equal would make a spike of any difference.
            deviation = max(1.4826 * deviation, 0.01 * abs(median), 1e-12)
            score = (value - median) / deviation
        self.values.append(value)
        return score, median
