"""A case of each part of `benchmarks/survival.py` that signals, stops, restarts or sets ranks apart:
the command itself, its launcher, its processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import _survival_nodes
import _survival_restarts
import _survival_signals
import _survival_stopped
import _survival_unequal

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

SIGNAL = {"number": 0, "processes": 2, "signal": "SIGTERM", "second": False}
STOP = {"number": 0, "how": "stopped", "rank": 1}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (_survival_signals, {**SIGNAL, "moment": "save", "to": "tree"}),
    (_survival_signals, {**SIGNAL, "moment": "start", "to": "rank 1"}),
    (_survival_signals, {**SIGNAL, "moment": "step", "to": "launcher", "second": True}),
    (_survival_stopped, {**STOP, "moment": "tokenise"}),
    (_survival_stopped, {**STOP, "moment": "save", "rank": 0}),
    (_survival_stopped, {**STOP, "moment": "step", "how": "sleeps"}),
    (_survival_stopped, {**STOP, "moment": "start", "how": "missing"}),
    (
        _survival_restarts,
        {"moment": "step", "rank": 1, "restarts": 2, "kills": 2, "overwrite": True},
    ),
    (_survival_unequal, {"kind": "key", "name": "learning_rate", "second": 1}),
    (_survival_nodes, {"kind": "signal", "machine": 1}),
    (_survival_nodes, {"kind": "cut", "machine": 1}),
]


@pytest.mark.parametrize(
    ("part", "case"), CASES, ids=[f"{p.__name__[10:]}-{i}" for i, (p, _) in enumerate(CASES)]
)
def test_a_case_ends_as_specified(part: Any, case: dict[str, Any], tmp_path: Path) -> None:
    needs_network = case.get("kind") in _survival_nodes.NEED_NETWORK
    if needs_network and not _survival_nodes.permitted():
        pytest.skip(f"network namespaces are not permitted here: {case['kind']}")
    found = part.run_case(case, tmp_path / "home")
    assert found["ok"] and found["seconds"] <= found["limit"], found["end"]


def test_the_same_seed_has_the_same_cases() -> None:
    for part in {p for p, _ in CASES}:
        assert list(part.cases(3, 12)) == list(part.cases(3, 12))
