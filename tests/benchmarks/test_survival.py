"""The report on how runs end: cases run once, failures are named, a cut line is no case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import survival


class Three:
    """A part of three cases, of which the second fails and the third is late."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def cases(self, seed, count):
        yield from ({"n": n, "seed": seed} for n in range(count))

    def run_case(self, case, home):
        assert home.is_dir() and not list(home.iterdir())
        self.ran.append(case["n"])
        late = 9.0 if case["n"] == 2 else 0.1
        return {
            "ok": case["n"] != 1,
            "seconds": late,
            "limit": 1.0,
            "end": f"ended so: {home}/x",
            "trials": 5,
        }


@pytest.fixture
def part(monkeypatch) -> Three:
    made = Three()
    monkeypatch.setattr(survival, "load_part", lambda name: made)
    return made


def run(path: Path, count: int, again: str = "no") -> int:
    return survival.run_part("soak", 7, count, path, again, until=float("inf"))


def test_recorded_cases_are_not_run_again(part, tmp_path):
    path = tmp_path / "survival.jsonl"
    assert run(path, 2) == 1
    assert run(path, 3) == 1
    assert part.ran == [0, 1, 2]
    run(path, 1, again="all")
    assert part.ran == [0, 1, 2, 0]
    run(path, 3, again="failed")
    assert part.ran == [0, 1, 2, 0, 1, 2]


def test_report_names_what_did_not_end_as_specified(part, tmp_path):
    path = tmp_path / "survival.jsonl"
    run(path, 3)
    report = survival.render(survival.read(path))
    assert "| 3 | 15 | 1 | 2 |" in report
    assert report.count("ended so: HOME/x") == 2


def test_a_line_that_was_cut_is_no_case(part, tmp_path):
    path = tmp_path / "survival.jsonl"
    run(path, 2)
    path.write_text(path.read_text()[:-20])
    assert [r["case"]["n"] for r in survival.read(path)] == [0]


def test_a_case_that_raises_is_a_failure(part, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "run_case", lambda case, home: json.loads("{"))
    path = tmp_path / "survival.jsonl"
    assert run(path, 1) == 1
    assert "JSONDecodeError" in survival.read(path)[0]["end"]
