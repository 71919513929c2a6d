"""A short form of `benchmarks/survival.py --part numbers`."""

from __future__ import annotations

from pathlib import Path

import pytest

import _survival_numbers as part
from small_runs import POOLS

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def _stop_pools() -> None:
    yield
    for pool in POOLS.values():
        pool.stop()


CASE = {
    "kind": "planted",
    "topology": "sequence parallel",
    "what": "loss -inf",
    "stage": "dpo",
    "finetuning": "lora",
    "accumulation": 2,
    "step": 3,
    "number": 0,
}


@pytest.mark.parametrize(
    "case",
    [
        CASE | {"on_nan": "stop"},
        CASE | {"on_nan": "skip"},
        {"kind": "weights", "seed": 0, "number": 0},
        {"kind": "spike", "seed": 0, "number": 0},
    ],
    ids=["stop", "skip", "weights", "spike"],
)
def test_part(case: dict, tmp_path: Path) -> None:
    result = part.run_case(case, tmp_path)
    assert result["ok"], result["end"]


def test_cases_describe_themselves() -> None:
    assert list(part.cases(1, 40)) == list(part.cases(1, 40))
