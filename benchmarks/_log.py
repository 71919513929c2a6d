"""What `trainer_log.jsonl` says of a run's steps, where each has a row (`logging_steps: 1`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def step_seconds(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Of each step after the first one, from its row before to its own: all that a step takes. The
    log's own `seconds_per_step` ends before the row is written, while the GPU may still update the
    weights.
    """
    clocks = [line["elapsed_seconds"] for line in lines if "loss" in line]
    return [after - before for before, after in itertools.pairwise(clocks)]


def step_speeds(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Tokens of documents a second and GPU of each step after the first one, by `step_seconds`."""
    rows = [line for line in lines if "loss" in line][1:]
    tokens = [row["tokens_per_second_per_gpu"] * row["seconds_per_step"] for row in rows]
    return [n / seconds for n, seconds in zip(tokens, step_seconds(lines), strict=True)]
