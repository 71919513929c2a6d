"""DPO, with a stored reference and with the adapter off, and reward models: DDP, FSDP2 and ZeRO-3 take the steps of one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = ["stage=dpo tune=full sp=2", "stage=dpo tune=lora sp=2", "stage=rm tune=full sp=2"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "zero3"])
def test_steps_equal_one_process(sharding: str, tmp_path: Path) -> None:
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", str(HERE / "preference_worker.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, sharding, str(path), *CASES], env=env, cwd=HERE, capture_output=True, text=True)
    assert path.exists(), done.stderr[-3000:]
    results = json.loads(path.read_text())
    for case in CASES:
        result = results.get(case, {"error": done.stderr[-3000:]})
        assert "error" not in result, f"{case}: {result['error']}"
        assert result["moved"] > 1e-3, "the parameters did not move: the comparison would prove nothing"
        for name in ("loss", "grad_norm", "param"):
            assert result[name] < 1e-5, f"{case}: {name} differs by {result[name]:.1e}"
        if case.startswith("stage=dpo tune=full"):
            assert result["first"] == pytest.approx(math.log(2), abs=1e-7)
