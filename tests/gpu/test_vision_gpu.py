"""Whole runs on rows with images on two GPUs, in float32: they take the steps of one GPU, with
copies, FSDP2 and ZeRO-3; a bf16 run of packed rows in every mode is near them.

    python -m pytest -q -s tests/gpu/test_vision_gpu.py     # about a minute on two GPUs
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.testing import RankError, RankPool
from small_runs import keys, run_on_ranks, steps
from vision_runs import TRAINED, of_run, write_data, write_model, write_zero3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.timeout(200),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
POOLS = {size: RankPool(size, backend="nccl") for size in (1, 2)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # DeepSpeed would want CUDA's compiler, which it does not need here.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    for pool in POOLS.values():
        pool.start()  # while files are written
    home = tmp_path_factory.mktemp("vision")
    write_model(home / "qwen3_vl", "qwen3_vl")
    write_data(home)
    write_zero3(home)
    yield home
    for pool in POOLS.values():
        pool.stop()


def run(home: Path, name: str, size: int, **changes: Any) -> list[dict[str, float]]:
    given = keys(home, name, sequence_parallel_size=size, **of_run(home, name, **changes))
    given |= {"use_cpu": False, "tf32": False} | changes
    words = [f"{k}={v}" for k, v in given.items()]
    try:
        POOLS[size].run(run_on_ranks, words, str(home / "cache"), timeout=90)
    except RankError as error:
        print(name, str(error)[-3000:], flush=True)
        raise
    log = steps(json.loads((home / name / "trainer_state.json").read_text())["log_history"])
    print(name, [(h["loss"], h["grad_norm"]) for h in log], flush=True)
    return log


@pytest.fixture(scope="module")
def one(home: Path) -> list[dict[str, float]]:
    return run(home, "one", 1, **TRAINED)


def same(one: list[dict[str, float]], two: list[dict[str, float]], error: float) -> None:
    assert len(one) == len(two) > 0
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=error), key


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "deepspeed"])
def test_vision_runs_on_two_gpus(home: Path, one: list[dict[str, float]], sharding: str) -> None:
    changes: dict[str, Any] = {"sharding": sharding}
    if sharding == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed")
        changes = {"deepspeed": str(home / "zero3.json")}
    same(one, run(home, sharding, 2, **TRAINED, **changes), 1e-4)


def test_vision_runs_in_bf16(home: Path) -> None:
    given = TRAINED | {"bf16": True, "packing": True, "per_device_train_batch_size": 1}
    alone = run(home, "bf16_one", 1, **given)
    for mode in ("zigzag-ring", "ulysses"):
        found = run(home, f"bf16_{mode}", 2, sequence_parallel_mode=mode, **given)
        same(alone, found, 2e-2)
