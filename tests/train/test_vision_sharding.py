"""Whole runs on rows with images whose parameters are sharded, on the CPU: they take the steps of one
process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpu_sharding import on_ranks_of_their_own
from small_runs import POOLS, keys, steps, train
from vision_runs import TRAINED, of_run, run_sharded, write_data, write_model, write_zero3

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("vision")
    write_model(home / "qwen3_vl", "qwen3_vl")
    write_data(home)
    write_zero3(home)
    yield home
    POOLS[1].stop()


CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("fsdp2", 2, 2, TRAINED),
    ("fsdp2", 4, 2, {"packing": True}),
    ("deepspeed", 2, 2, TRAINED),
    ("ddp", 4, 4, TRAINED),
]
"""Sharding, processes, sequence_parallel_size, further keys."""


@pytest.mark.parametrize(("sharding", "processes", "size", "more"), CASES)
def test_vision_runs_that_are_sharded_are_those_of_one_process(
    home: Path, sharding: str, processes: int, size: int, more: dict[str, Any]
) -> None:
    groups = processes // size
    # Rows of one micro-batch and group are one row: as many samples in a step of one process.
    changes = of_run(home, "one", **more) | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2 * groups,
    }
    one = steps(train(home, f"one_{sharding}_{processes}", 1, **changes))
    name = f"{sharding}_{processes}"
    given = keys(home, name, sequence_parallel_size=size, **changes)
    given |= {"gradient_accumulation_steps": 2, "sharding": sharding}
    if sharding == "deepspeed":
        given |= {"deepspeed": str(home / "zero3.json"), "use_cpu": False, "sharding": "auto"}
    words = [f"{k}={v}" for k, v in given.items()]
    on_ranks_of_their_own(processes, 300, run_sharded, words, str(home / "cache"), sharding)
    log = json.loads((home / name / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "grad_norm"):
        expected = [h[key] for h in one]
        assert [h[key] for h in steps(log)] == pytest.approx(expected, rel=3e-5), key
