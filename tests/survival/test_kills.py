"""A run that is killed and started again by the same command ends as one that was not, file by file.
`benchmarks/survival.py --part kills` is the long form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import _survival_kills as kills
import _survival_runs as runs

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def kill(how: str, at: float, victim: str = "rank", rank: int = 0, cut: bool = True) -> Any:
    return {"how": how, "victim": victim, "rank": rank, "at": at, "cut": cut}


def test_a_kill_inside_a_save(tmp_path: Path) -> None:
    """The second of three saves, with a file half written: dropout, sums between two log rows and
    the learning rate go on in every bit.
    """
    case = {"run": "lora dropout", "kills": [kill("save", 0.55)], "real": False}
    result = kills.run_case(case, tmp_path)
    assert result["ok"], result["end"]
    assert (result["trials"], result["in_save"]) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("run", runs.RUNS)
def test_chains_of_kills(run: str, tmp_path: Path) -> None:
    last = runs.RUNS[run][0] - 1
    found = [
        kill("event", 0.3, "launcher"),
        kill("save", 0.6, "tree", last),
        kill("event", 0.65, "rank", last),
    ]
    result = kills.run_case({"run": run, "kills": found, "real": False}, tmp_path)
    assert result["ok"], result["end"]


@pytest.mark.slow
def test_a_kill_of_the_command_with_torchrun(tmp_path: Path) -> None:
    found = [kill("save", 0, "rank", 1), kill("save", 0, "launcher")]
    result = kills.run_case({"run": "sp2", "kills": found, "real": True}, tmp_path)
    assert result["ok"] and result["trials"] == 2, result["end"]
