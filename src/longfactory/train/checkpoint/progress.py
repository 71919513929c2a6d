"""What a run has seen and not yet logged, as a file of a checkpoint: with it the rows of the log
and the results of a run that was stopped are those of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfactory.config.folder import STATE_FILE, write_whole

FORMAT = 2
"""1: without a manifest."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands at a checkpoint. Sums that each process has of its own are lists, in the
    order of ranks.
    """

    tokens: int
    """Input tokens seen, of all data-parallel groups."""
    samples: int
    """Samples that the optimizer steps took."""
    runtime: float
    """Seconds of training so far, of all starts together."""
    unlogged: list[float]
    """Each process's sum of losses since the last row of the log."""
    total_loss: float
    """The sum of logged losses, one a step."""
    last_logged: int
    """The step of the last row."""
    metrics: list[dict[str, list[float]]]
    """Each process's sums and counts of the stage's metrics since the last row."""
    grad_norm: float | None = None
    learning_rate: float | None = None
    """Of the last step."""
    epoch_ended: bool = True
    """Whether what comes at the end of an epoch (evaluation, rows of the log) had been done."""
    updates: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0, 0, 0])
    """Steps since the last row, those of them without an update (`on_nan: skip`), both of all rows
    before, and updates left out in all.
    """
    patience: int | None = None
    """Evaluations without improvement, counted by early stopping."""

    def for_rank(self, rank: int, world: int) -> tuple[float, dict[str, list[float]]]:
        """The sums of losses and of metrics with which a process goes on. Of a run with another
        number of processes each gets an equal part: what is logged is their mean, or their sum.
        """
        if len(self.unlogged) == world:
            return self.unlogged[rank], self.metrics[rank]
        loss = math.fsum(self.unlogged) / max(1, len(self.unlogged))
        return loss, _mean(self.metrics, len(self.metrics))


def _mean(metrics: Sequence[dict[str, list[float]]], count: int) -> dict[str, list[float]]:
    names = sorted({name for each in metrics for name in each})
    return {
        name: [math.fsum(each.get(name, [0, 0])[i] for each in metrics) / count for i in (0, 1)]
        for name in names
    }


def write_state(folder: Path, state: dict[str, Any], progress: Progress) -> None:
    """Writes the file. `state`: what decides which samples a step takes, and the stage's own."""
    text = {"format": FORMAT, **state, "progress": dataclasses.asdict(progress)}
    write_whole(folder / STATE_FILE, json.dumps(text, indent=1))


def read_state(folder: Path | str) -> dict[str, Any] | None:
    """The file's content; None where there is none that can be read."""
    try:
        found = json.loads((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_progress(state: dict[str, Any] | None) -> Progress | None:
    """Of a file's content; None where it was written before it held this."""
    if state is None or "progress" not in state:
        return None
    known = {f.name for f in dataclasses.fields(Progress)}
    return Progress(**{k: v for k, v in state["progress"].items() if k in known})
