"""What sharded runs leave behind: a whole plain checkpoint of the trained weights, and one to go on from with another split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_a_sharded_run_saves_whole_weights_and_resumes_with_another_size(sharding: str, tmp_path: Path) -> None:
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "saving_worker.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, sharding, str(tmp_path)], env=env, cwd=HERE, capture_output=True, text=True, timeout=350)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kind"].endswith("FSDP" if sharding == "fsdp2" else "DEEPSPEED") and result["sharded"]

    from invariance_worker import tiny
    from transformers import AutoModelForCausalLM

    trained = torch.load(tmp_path / "trained.pt")
    before = dict(tiny("llama").named_parameters())
    # Both the final folder, and the one written at the last step, as a person loads them.
    folders = [tmp_path / "out"] + ([tmp_path / "out" / "checkpoint-2"] if sharding == "fsdp2" else [])
    for folder in folders:
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        assert loaded.keys() == trained.keys() == before.keys()
        for name, p in loaded.items():
            assert torch.equal(p, trained[name]), name
        assert max((loaded[n] - before[n]).abs().max().item() for n in loaded) > 1e-2
    assert not list((tmp_path / "out").glob("*.part"))

    whole, resumed = result["losses"]
    assert len(whole) == 2 and resumed == pytest.approx(whole, abs=1e-5)
    assert result["resumed"] < 2e-4, "the second step, made from the checkpoint with size 1, is another one"
