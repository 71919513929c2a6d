"""What a run has seen and not logged goes through a file, and from any number of ranks to any other."""

from __future__ import annotations

from pathlib import Path

import torch

from longfactory.stages.metrics import MetricSums
from longfactory.train.checkpoint.progress import (
    Progress,
    read_progress,
    read_state,
    write_state,
)

SEEN = Progress(
    tokens=7,
    samples=8,
    runtime=1.5,
    unlogged=[0.1, 0.3],
    total_loss=1 / 3,
    last_logged=3,
    metrics=[{"accuracy": [1.0, 2.0]}, {"accuracy": [2.0, 4.0]}],
    patience=2,
)


def test_every_number_comes_back_in_every_bit(tmp_path: Path) -> None:
    write_state(tmp_path, {"samples": 16, "stage": {}}, SEEN)
    state = read_state(tmp_path)
    assert state is not None and state["samples"] == 16
    assert read_progress(state) == SEEN
    assert read_progress({"samples": 16}) is None and read_state(tmp_path / "absent") is None


def test_ranks_go_on_with_their_own_or_with_equal_parts() -> None:
    assert SEEN.for_rank(1, 2) == (0.3, {"accuracy": [2.0, 4.0]})
    loss, metrics = SEEN.for_rank(0, 4)
    assert loss == 0.2 and metrics == {"accuracy": [1.5, 3.0]}


def test_sums_of_metrics_go_on() -> None:
    sums, rest = MetricSums(), MetricSums()
    sums.add({"a": (torch.tensor(1.0), 2)})
    rest.load_state_dict(sums.state_dict(), torch.device("cpu"))
    for x in (sums, rest):
        x.add({"a": (torch.tensor(5.0), 1)})
    assert rest.means() == sums.means() == {"a": 2.0}
