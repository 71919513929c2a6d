"""The numbers of the progress line on a GPU, through the command: MFU, peak and tokens a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longfactory.memory.shapes import kind_of
from make_model import make_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("gpus", [1, 2])
def test_numbers_of_a_run(gpus: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    model = make_model("qwen2.5-0.5b", tmp_path / "model", vocabulary=2000)
    out = tmp_path / "out"
    keys = {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "dataset_dir": ROOT / "data",
        "dataset": "manual_pt",
        "stage": "pt",
        "finetuning_type": "full",
        "bf16": "true",
        "cutoff_len": 8192,
        "packing": "true",
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "save_final_model": "false",
        "output_dir": out,
        "nproc_per_node": gpus,
        "sequence_parallel_size": gpus,
    }
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, *(f"{k}={v}" for k, v in keys.items())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=180,
        env=env | {"LONGFACTORY_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[-6000:])
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert len(lines) == 3 and last["packing"] > 0.9
    # some 0.36 billion parameters: 6 products each a token, and some for attention
    name = torch.cuda.get_device_name(0)
    if kind_of(name) in ("H100", "H200"):
        least = last["tokens_per_second_per_gpu"] * 6 * 3.5e8 / 989e12
        assert least < last["mfu"] < 0.7
    assert 4 < last["peak_memory_gib"] < torch.cuda.get_device_properties(0).total_memory / 2**30
    assert f"{last['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, MFU" in done.stderr
