"""Kills, signals, stopped ranks and a long save on two GPUs (NCCL, FSDP2): batches of runs side by
side.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import _survival_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("batch", ["long save", "signals", "stopped"])
def test_runs_end_as_specified(batch: str, tmp_path: Path) -> None:
    found = _survival_gpus.run_case({"batch": batch, "seed": 1}, tmp_path / "home")
    assert found["ok"], found["end"]
