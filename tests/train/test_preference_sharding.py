"""DPO, KTO and asft, each with two sources of the reference, and reward models: DDP, FSDP2 and ZeRO
take the steps of one process.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cpu_sharding import on_ranks_of_their_own
from preference_worker import run_cases

pytestmark = pytest.mark.processes

CASES = [
    "stage=dpo tune=full sp=2",
    "stage=dpo tune=lora sp=2",
    "stage=rm tune=full sp=2",
    "stage=asft tune=full sp=2",
    "stage=asft tune=lora sp=2",
]
# ZeRO-1 and 2 share their path with ZeRO-3 but for what they keep whole.
QUICK = {"ddp": CASES[:3], "fsdp2": list(CASES), "zero3": list(CASES)}
QUICK["zero3"] += [
    "sharding=zero1 stage=dpo tune=full sp=2",
    "sharding=zero1 stage=kto tune=lora sp=2",
    "sharding=zero2 stage=dpo tune=lora sp=2",
    "sharding=zero2 stage=kto tune=full sp=2",
]
GRID = [
    f"stage={stage} tune={tune} sp={sp}"
    for stage in ("dpo", "kto", "rm", "asft")
    for tune in ("full", "lora")
    for sp in (1, 2, 4)
]
REST = {s: [c for c in GRID if c not in QUICK[s]] for s in QUICK}
REST["zero3"] += [
    c
    for z in ("zero1", "zero2")
    for c in (f"sharding={z} {case}" for case in GRID)
    if c not in QUICK["zero3"]
]


def check(sharding: str, cases: list[str], folder: Path, timeout: float) -> None:
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    results = on_ranks_of_their_own(4, timeout, run_cases, sharding, cases, str(folder))[0]
    assert list(results) == cases
    for case, result in results.items():
        assert result["moved"] > 1e-3, (
            f"{case}: the parameters did not move: the comparison would prove nothing"
        )
        for name in ("loss", "grad_norm", "param"):
            assert result[name] < 1e-5, f"{case}: {name} differs by {result[name]:.1e}"
        if "stage=dpo tune=full" in case:
            assert result["first"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "sharding", [s if s == "zero3" else pytest.param(s, marks=pytest.mark.slow) for s in QUICK]
)
def test_steps_equal_one_process(sharding: str, tmp_path: Path) -> None:
    check(sharding, QUICK[sharding], tmp_path, 800)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("sharding", list(REST))
def test_whole_grid(sharding: str, tmp_path: Path) -> None:
    check(sharding, REST[sharding], tmp_path, 2900)
