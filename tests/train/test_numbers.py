"""A loss or gradient that is NaN or Inf: no update, no save, the batch by name, on every rank."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpu_sharding import on_ranks_of_their_own
from longfactory.errors import UserError
from longfactory.train import numbers as numbers_module
from longfactory.train.numbers import LEAST, SKIPS, LoggedSteps, Numbers, Spikes
from longfactory.train.trainer import RowTrainer
from numbers_worker import end_of_sharded
from small_runs import POOLS, home, keys, run_on_ranks  # noqa: F401


class Told(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def planted(words: list[str], cache: str, what: str, step: int) -> dict[str, Any]:
    """A run in which a loss, a gradient or nothing is no number in optimizer step `step`, on the
    last rank; `leave out`: the step makes no update, without anything wrong in it.
    """
    original, before = RowTrainer.stage_loss, Numbers.may_update
    told = Told()
    logging.getLogger("longfactory").addHandler(told)
    last = _rank() == (dist.get_world_size() - 1 if dist.is_initialized() else 0)

    def stage_loss(self: RowTrainer, model: Any, row: Any) -> Any:
        loss, metrics = original(self, model, row)
        if model.training and self.state.global_step + 1 == step and last:
            if what in ("loss", "state"):
                loss = loss * math.nan
                if what == "state":  # as NaN log-probabilities would leave it
                    assert self.stage._rewards is not None  # type: ignore[attr-defined]
                    self.stage._rewards = self.stage._rewards * math.nan  # type: ignore[attr-defined]
            elif what == "gradient":
                loss.register_hook(lambda g: g * math.inf)
        return loss, metrics

    def may_update(self: Numbers, number: int, *args: Any) -> bool:
        return before(self, number, *args) and not (what == "leave out" and number == step)

    RowTrainer.stage_loss, Numbers.may_update = stage_loss, may_update  # type: ignore[method-assign]
    error = None
    try:
        run_on_ranks(words, cache)
    except UserError as e:
        error = str(e)
    finally:
        RowTrainer.stage_loss, Numbers.may_update = original, before  # type: ignore[method-assign]
        logging.getLogger("longfactory").removeHandler(told)
    return {"error": error, "told": told.lines}


def run(
    home: Path,  # noqa: F811
    name: str,
    ranks: int,
    what: str,
    step: int = 2,
    **changes: Any,
) -> list[dict[str, Any]]:
    given = keys(home, name, save_strategy="steps", save_steps=1, **changes)
    words = [f"{k}={v}" for k, v in given.items()]
    return POOLS[ranks].run(planted, words, str(home / "cache"), what, step)


CASES = {
    "one": (1, {}),
    "sp": (2, {"sequence_parallel_size": 2}),
    "ddp": (2, {"sharding": "ddp", "packing": False}),
    "host": (1, {"optimizer_placement": "host", "offload_gradients": True}),
    "overlap": (1, {"optimizer_placement": "host", "optimizer_overlap": True, "max_grad_norm": 0}),
}


@pytest.mark.processes
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("case", CASES)
def test_the_run_ends_before_the_update(case: str, what: str, home: Path) -> None:  # noqa: F811
    ranks, changes = CASES[case]
    results = run(home, f"stop_{case}_{what}", ranks, what, **changes)
    assert len({r["error"] for r in results}) == 1, "every rank ends, with the same words"
    error = results[0]["error"]
    assert error is not None and error.startswith(f"Step 2: the {what}")
    first = ranks - 1 if what == "loss" else 0
    assert f"(rank {first}: data set 'talks', row " in error
    assert "on_nan: skip" in error
    saved = sorted(p.name for p in (home / f"stop_{case}_{what}").glob("checkpoint-*"))
    assert saved == ["checkpoint-1"]
    assert not (home / f"stop_{case}_{what}" / "model.safetensors").exists()


# Each of both where one process skips, one of them in each other way.
SKIPPED = [(case, what) for case in ("one", "sp", "ddp", "host") for what in ("loss", "gradient")]
QUICK = {
    ("one", "loss"),
    ("one", "gradient"),
    ("sp", "loss"),
    ("ddp", "gradient"),
    ("host", "loss"),
}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "what"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each not in QUICK)) for each in SKIPPED],
)
def test_a_skipped_update_is_no_update(case: str, what: str, home: Path) -> None:  # noqa: F811
    """Weights, states and log are those of a run that leaves the same update out."""
    ranks, changes = CASES[case]
    changes = {**changes, "save_only_model": False, "logging_steps": 3}
    found = {}
    for name, of in (("skip", what), ("reference", "leave out")):
        results = run(home, f"{name}_{case}_{what}", ranks, of, on_nan="skip", **changes)
        assert [r["error"] for r in results] == [None] * ranks
        folder = home / f"{name}_{case}_{what}"
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        found[name] = (
            (folder / "model.safetensors").read_bytes(),
            [(h.get("loss"), h["step"]) for h in log if "learning_rate" in h],
            [h["train_loss"] for h in log if "train_loss" in h],
        )
        if name == "skip":
            told = [line for line in results[0]["told"] if "The update is skipped" in line]
            assert len(told) == 1 and "data set 'talks', row" in told[0]
            assert [h["skipped_updates"] for h in log if "learning_rate" in h] == [1]
    assert found["skip"] == found["reference"]
    assert all(math.isfinite(loss) for loss, _ in found["skip"][1])


@pytest.mark.processes
def test_a_skipped_step_leaves_nothing_in_the_stage(home: Path) -> None:  # noqa: F811
    """BCO's running mean of rewards: a NaN in it would make every later loss NaN."""
    pairs = [{"p": "a" * (9 + i), "c": "b" * (5 + i), "r": "c" * (20 - i)} for i in range(12)]
    (home / "pairs.json").write_text(json.dumps(pairs))
    info = json.loads((home / "dataset_info.json").read_text())
    columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
    info["pairs"] = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    (home / "dataset_info.json").write_text(json.dumps(info))
    bco = {"stage": "dpo", "dataset": "pairs", "pref_bco_weight": 1, "packing": None}
    weights = []
    for name, of in (("bco_skip", "state"), ("bco_reference", "leave out")):
        assert run(home, name, 1, of, on_nan="skip", **bco)[0]["error"] is None
        log = json.loads((home / name / "trainer_state.json").read_text())["log_history"]
        assert all(math.isfinite(h["loss"]) for h in log if "loss" in h)
        weights.append((home / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def nowhere(sample: int) -> tuple[str, int]:
    return "data", sample


def test_every_update_skipped_ends_the_run() -> None:
    model = torch.nn.Linear(1, 1)
    numbers = Numbers("skip", nowhere)
    for step in range(1, SKIPS):
        numbers.begin([])
        numbers.add(torch.tensor(math.nan))
        assert not numbers.may_update(step, torch.tensor(1.0), model)
    numbers.add(torch.tensor(math.nan))
    with pytest.raises(UserError, match=f"Step {SKIPS}: {SKIPS} updates in a row"):
        numbers.may_update(SKIPS, torch.tensor(1.0), model)


def test_a_scaler_may_look_for_its_scale() -> None:
    """fp16: an infinite gradient is the scaler's; a loss that is NaN is not, nor is the 40th."""
    model = torch.nn.Linear(1, 1)
    numbers = Numbers("stop", nowhere, scaled=lambda: True)

    def step(number: int, loss: float, norm: float) -> bool:
        numbers.begin([])
        numbers.add(torch.tensor(loss))
        return numbers.may_update(number, torch.tensor(norm), model)

    assert all(step(n, 1.0, math.inf) for n in range(1, SKIPS))
    assert step(SKIPS, 1.0, 2.0), "a good step begins the count anew"
    assert all(step(n, 1.0, math.nan) for n in range(1, SKIPS))
    with pytest.raises(UserError, match="fp16"):
        step(SKIPS, 1.0, math.inf)
    with pytest.raises(UserError, match="the loss is nan"):
        step(1, math.nan, 2.0)
    assert numbers.skipped == 0


def spiky(value: Callable[[int], float], count: int) -> list[float]:
    spikes = Spikes()
    return [spikes.score(value(i))[0] for i in range(count)]


def test_spikes() -> None:
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    calm = spiky(lambda i: 2.0 + noise[i], 200)
    assert max(calm) < 8 and calm[: LEAST - 1] == [0.0] * (LEAST - 1)
    assert spiky(lambda i: 2.0 + noise[i] + 20 * (i == 150), 200)[150] > 20
    assert spiky(lambda i: 1.0 + 1e-6 * (i == 100), 101)[100] < 1, "equal numbers are no scale"
    assert max(spiky(lambda i: 5.0 if i < 100 else 7.0, 200)[160:]) < 8, "a new level is no spike"
    assert spiky(lambda i: math.nan, 50) == [0.0] * 50


def test_a_spike_is_reported_with_its_rows() -> None:
    numbers, model = Numbers("stop", nowhere), torch.nn.Linear(1, 1)
    told = Told()
    logging.getLogger("longfactory").addHandler(told)
    for step in range(1, 30):
        numbers.begin([])
        numbers.add(torch.tensor(30.0 if step == 28 else 2.0 + step % 3 / 10))
        assert numbers.may_update(step, torch.tensor(1.0), model)
    logging.getLogger("longfactory").removeHandler(told)
    assert len(told.lines) == 1 and told.lines[0].startswith("Step 28: the loss is 30, a spike")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("sharding", "on_nan", "what"),
    [
        ("fsdp2", "stop", "loss"),
        ("fsdp2", "skip", "gradient"),
        pytest.param("fsdp2", "stop", "gradient", marks=pytest.mark.slow),
        pytest.param("fsdp2", "skip", "loss", marks=pytest.mark.slow),
        pytest.param("zero2", "stop", "loss", marks=pytest.mark.slow),
        pytest.param("zero3", "stop", "gradient", marks=pytest.mark.slow),
    ],
)
def test_sharded(sharding: str, on_nan: str, what: str, tmp_path: Path) -> None:
    if sharding.startswith("zero"):
        pytest.importorskip("deepspeed")
    results = on_ranks_of_their_own(2, 200, end_of_sharded, sharding, on_nan, what, str(tmp_path))
    assert results[0]["kind"].endswith("FSDP" if sharding == "fsdp2" else "DEEPSPEED")
    assert len({r["error"] for r in results}) == 1
    if on_nan == "skip":
        assert results[0]["error"] is None and all(r["finite"] for r in results)
        assert results[0]["log"][-1]["skipped_updates"] == 1
    else:
        assert results[0]["error"].startswith(f"Step 2: the {what}")
        assert results[0]["saved"] == ["checkpoint-1"]
        # DeepSpeed's engine updates with the backward, and nothing of that is saved
        assert sharding != "fsdp2" or all(r["finite"] for r in results)


def test_every_rank_hears_of_one_infinite_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's norm is infinite and this one's is not; and the other way round."""
    sent: list[list[float]] = []

    def all_reduce(found: torch.Tensor) -> None:
        sent.append(found.tolist())
        found += torch.tensor([0.0, 1.0, 2.0], dtype=found.dtype)

    monkeypatch.setattr(numbers_module, "is_distributed", lambda: True)
    monkeypatch.setattr(numbers_module, "from_all", lambda mine: [mine, None])
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    numbers, model = Numbers("skip", nowhere), torch.nn.Linear(1, 1)
    for step, norm in enumerate((1.0, math.inf), 1):
        numbers.begin([])
        numbers.add(torch.tensor(2.0))
        assert not numbers.may_update(step, torch.tensor(norm), model)
    assert sent == [[0.0, 0.0, 2.0], [0.0, 1.0, 2.0]]


def test_the_logged_loss_is_of_the_steps_that_made_an_update() -> None:
    """transformers divides a sum of three losses by all four steps."""
    steps = LoggedSteps(all=4, skipped=1)
    logs = {"loss": 6.0 / 4, "grad_norm": math.inf}
    steps.correct(logs, skipped_updates=1)
    assert logs == {"loss": 2.0, "skipped_updates": 1}
    steps.all, steps.skipped = 2, 2
    none = {"loss": 0.0, "grad_norm": 1.0}
    steps.correct(none, skipped_updates=3)
    assert none == {"grad_norm": 1.0, "skipped_updates": 3}
    whole = {"train_loss": 6.0 / 6}
    steps.correct(whole, skipped_updates=3)
    assert whole == {"train_loss": 2.0}
