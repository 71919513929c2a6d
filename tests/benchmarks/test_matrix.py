"""benchmarks/matrix.py: its cases cover every pair, its comparison has teeth, and its CPU form is
green.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
import matrix  # noqa: E402


def test_every_pair_of_values_occurs_unless_a_rule_refuses_it() -> None:
    cases = matrix.pairwise(matrix.AXES)
    seen = {frozenset(pair) for case in cases for pair in itertools.combinations(case.items(), 2)}
    for a, b in itertools.combinations(matrix.AXES, 2):
        for x, y in itertools.product(matrix.AXES[a], matrix.AXES[b]):
            pair = {a: x, b: y}
            refused = pair in (
                {"processes": "one", "sp": "2"},
                {"precision": "pure_bf16", "processes": "zero3"},
            )
            assert (frozenset({(a, x), (b, y)}) in seen) != refused, (a, x, b, y)
    assert len(cases) <= 75


def row(loss: float, precision: str = "bf16") -> dict:
    return {
        "precision": precision,
        "loss": [loss] * matrix.STEPS,
        "grad_norm": [2.0] * matrix.STEPS,
    }


@pytest.mark.parametrize(
    ("ours", "verdict"), [(7.0, "same"), (7.02, "same"), (7.2, "DIFFERENT"), (14.0, "DIFFERENT")]
)
def test_the_loops_own_error_is_the_measure(ours: float, verdict: str) -> None:
    assert matrix.compare(row(ours), row(7.0), row(7.01))[0] == verdict


def test_loops_with_moved_embeddings_widen_what_one_loop_allows() -> None:
    moved = [{**row(7.0), "loss": [7.0, 7.1, 7.0]}]
    assert matrix.compare(row(7.2), row(7.0), row(7.01), moved)[0] == "same"
    assert matrix.compare(row(7.4), row(7.0), row(7.01), moved)[0] == "DIFFERENT"
    assert matrix.compare(row(7.2), row(7.0), row(7.01), [{"error": "memory"}])[0] == "DIFFERENT"


def test_numbers_that_are_not_finite_or_missing_are_no_success() -> None:
    assert matrix.compare(row(float("nan")), row(7.0), row(7.01))[0].startswith("loss is [nan")
    assert matrix.compare(row(float("nan")), row(7.0), row(float("nan")))[0] == matrix.NOT_FINITE
    skipped = {**row(7.0, "fp16"), "grad_norm": [2.0, float("inf"), 5.0], "loss": [7.0, 7.0, 9.0]}
    assert matrix.compare(skipped, row(7.0), row(7.01))[0].endswith("overflow in step 2")
    assert matrix.compare({**row(7.0), "loss": [7.0]}, row(7.0), row(7.0))[0] == "1 steps logged"
    assert matrix.compare(row(7.0), {"error": "memory"}, row(7.0))[0].startswith("no reference")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_form_is_green(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "matrix.py"), "--cpu", "--rows", "14"]
    command += ["--time", "1700", "--home", str(tmp_path / "home"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads((tmp_path / "matrix_cpu.json").read_text())["rows"]
    assert done.returncode == 0, [r for r in rows if not matrix.good(r)]
    assert {r["family"] for r in rows} == set(matrix.AXES["family"])
