"""The numbers of the progress line on a GPU, through the command: MFU, peak and tokens a second;
and that a row of the log does not wait for the update.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.memory.shapes import kind_of
from longfactory.train.trainer import RowTrainer
from make_model import make_model
from small_runs import POOLS, home, keys, run_on_ranks  # noqa: F401

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


def row_beside_the_update(words: list[str], cache: str, beside: bool) -> list[bool]:
    """Whether the GPU was done with the update, made 0.1 s longer, as each row was logged."""
    after, log, update = RowTrainer._maybe_log_save_evaluate, RowTrainer.log, torch.cuda.Event()
    own, done = RowTrainer._beside_the_update, []

    def longer(self: RowTrainer, *args: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(200_000_000)
        update.record()
        after(self, *args, **kwargs)

    def logged(self: RowTrainer, logs: dict[str, float], *args: Any) -> None:
        log(self, logs, *args)
        if "grad_norm" in logs:
            done.append(update.query())

    RowTrainer._maybe_log_save_evaluate = longer  # type: ignore[method-assign]
    RowTrainer.log = logged  # type: ignore[method-assign]
    if not beside:
        RowTrainer._beside_the_update = lambda self: contextlib.nullcontext()  # type: ignore
    try:
        run_on_ranks(words, cache)
    finally:
        RowTrainer._maybe_log_save_evaluate, RowTrainer.log = after, log  # type: ignore
        RowTrainer._beside_the_update = own  # type: ignore[method-assign]
    return done


def test_a_row_of_the_log_does_not_wait_for_the_update(home: Path) -> None:  # noqa: F811
    """The same rows, in every bit, as where each waits."""
    rows = []
    for beside in (True, False):
        given = keys(home, f"beside_{beside}", use_cpu=False, bf16=True)
        words = [f"{k}={v}" for k, v in given.items()]
        (done,) = POOLS[1].run(row_beside_the_update, words, str(home / "cache"), beside)
        assert done[1:] == [not beside] * 3  # the optimizer's first step tries its kernel
        log = json.loads((Path(given["output_dir"]) / "trainer_state.json").read_text())
        rows.append([(x["loss"], x["grad_norm"]) for x in log["log_history"] if "loss" in x])
    assert rows[0] == rows[1] and len(rows[0]) == 4
