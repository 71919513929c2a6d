"""Whole runs on rows with images whose parameters are sharded, on the CPU: they take the steps of one
process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

LORA = {"finetuning_type": "lora", "lora_rank": 4, "learning_rate": 1e-2}
TUNINGS: dict[str, dict[str, Any]] = {
    "all": TRAINED,
    "lora": LORA,
    "lora of the tower too": LORA | {"freeze_vision_tower": False},
    "projector": {"train_mm_proj_only": True},
}
MODES = ("zigzag-ring", "ulysses", "llama3", "usp")
SHARDINGS = ("ddp", "fsdp2", "deepspeed")
ACCUMULATIONS = (1, 3)


class Pair(NamedTuple):
    mode: str
    tuning: str
    sharding: str
    accumulation: int


PAIRS = [
    Pair(mode, tuning, SHARDINGS[(m + t) % 3], ACCUMULATIONS[(m // 2 + t) % 2])
    for m, mode in enumerate(MODES)
    for t, tuning in enumerate(TUNINGS)
]


def test_vision_pairs_have_all_pairs() -> None:
    """Every value of a setting meets every value of each other setting in some run."""
    values = (MODES, tuple(TUNINGS), SHARDINGS, ACCUMULATIONS)
    for a, b in itertools.combinations(range(4), 2):
        met = {(pair[a], pair[b]) for pair in PAIRS}
        assert met == set(itertools.product(values[a], values[b])), (a, b)


@pytest.mark.parametrize(("sharding", "processes", "size", "more"), CASES)
def test_vision_runs_that_are_sharded_are_those_of_one_process(
    home: Path, sharding: str, processes: int, size: int, more: dict[str, Any]
) -> None:
    name = f"{sharding}_{processes}"
    same_as_one(home, name, sharding, processes, size, 2, more)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(str, p)).replace(" ", "_"))
def test_vision_runs_of_each_mode_sharding_accumulation_and_tuning(home: Path, pair: Pair) -> None:
    processes = 4 if pair.mode == "usp" else 2
    more = TUNINGS[pair.tuning] | {"sequence_parallel_mode": pair.mode}
    name = f"{pair.mode}_{pair.tuning}".replace(" ", "_")
    same_as_one(home, name, pair.sharding, processes, processes, pair.accumulation, more)


def same_as_one(
    home: Path,
    name: str,
    sharding: str,
    processes: int,
    size: int,
    accumulation: int,
    more: dict[str, Any],
) -> None:
    """A run's losses and norms are those of one process that takes the same samples."""
    groups = processes // size
    # Rows of one micro-batch and group are one row: as many samples in a step of one process.
    changes = of_run(home, "one", **more) | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation * groups,
    }
    alone = {k: v for k, v in changes.items() if k != "sequence_parallel_mode"}
    one = steps(train(home, f"one_{name}", 1, **alone))
    given = keys(home, name, sequence_parallel_size=size, **changes)
    given |= {"gradient_accumulation_steps": accumulation, "sharding": sharding}
    if sharding == "deepspeed":
        given |= {"deepspeed": str(home / "zero3.json"), "use_cpu": False, "sharding": "auto"}
    words = [f"{k}={v}" for k, v in given.items()]
    on_ranks_of_their_own(processes, 300, run_sharded, words, str(home / "cache"), sharding)
    log = json.loads((home / name / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "grad_norm"):
        expected = [h[key] for h in one]
        assert [h[key] for h in steps(log)] == pytest.approx(expected, rel=1e-6), key
