from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_loop.py"


def test_example_agrees_with_one_process() -> None:
    """The example compares itself with one process and fails where they differ."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(EXAMPLE),
        "--steps",
        "3",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest difference" in done.stdout


def test_engine_imports_torch_alone() -> None:
    """And the list of kernel names, which configurations share and which imports nothing."""
    code = (
        "import sys, longfactory.sp; bad = [m for m in sys.modules if m.startswith('longfactory.')"
        " and not m.startswith('longfactory.sp') or m == 'transformers'];"
        " bad.remove('longfactory.kernel_names'); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
