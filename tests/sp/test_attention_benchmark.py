from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attention.py"


@pytest.mark.slow
def test_benchmark_runs_on_cpus(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert not [r for r in rows if "failed" in r]
    assert {"zigzag-ring", "ulysses", "llama3", "auto"} <= {
        r["row"].split(",")[0] for r in rows if "both" in r
    }
