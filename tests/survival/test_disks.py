"""A short form of `benchmarks/survival.py --part disks`."""

from __future__ import annotations

from pathlib import Path

import pytest

import _survival_disks as part

pytestmark = [pytest.mark.processes, pytest.mark.slow]

CASE = {"stage": "sft", "finetuning": "lora", "number": 0}


@pytest.mark.parametrize(
    "case",
    [
        CASE | {"place": "cache", "fault": "full", "free": 100},
        CASE | {"place": "output", "fault": "full", "free": 40_000},
        CASE | {"place": "tokenized_path", "fault": "/dev/null/x"},
        CASE | {"place": "output", "fault": "read-only"},
    ],
    ids=lambda case: f"{case['place']} {case['fault']}".replace("/", "_"),
)
def test_part(case: dict, tmp_path: Path) -> None:
    result = part.run_case(case, tmp_path)
    if result["end"].startswith("left out"):
        pytest.skip(result["end"])
    assert result["ok"], result["end"]
