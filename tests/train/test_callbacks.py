"""The log file that boards read, functions at the start, and the pictures of curves."""

from __future__ import annotations

import gc
import json
import logging
import re
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from longfactory.train.callbacks import (
    LOG_FILE,
    AtStart,
    LogFile,
    Reported,
    objects_frozen,
    report_failures,
)
from longfactory.train.output import read_log
from longfactory.train.plots import overlay, plot_history, smooth
from longfactory.train.profiler import Profiler

EVALUATES = types.SimpleNamespace(do_eval=True)


def state(
    step: int, total: int = 8, tokens: int = 0, main: bool = True, **more: Any
) -> TrainerState:
    return TrainerState(
        global_step=step,
        max_steps=total,
        num_input_tokens_seen=tokens,
        is_world_process_zero=main,
        **more,
    )


def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    import longfactory.train.callbacks as module

    now = types.SimpleNamespace(t=1000.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(time=lambda: now.t))
    return now


def test_a_line_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    log = LogFile(str(tmp_path))
    log.on_train_begin(EVALUATES, state(0), None)
    now.t += 4000
    logs = {
        "loss": 1.5,
        "grad_norm": 0.25,
        "learning_rate": 1e-5,
        "epoch": 0.5,
        "num_input_tokens_seen": 6000,
    }
    log.on_log(None, state(2), None, logs=logs)
    (line,) = read_log(tmp_path)
    assert line == {
        "current_steps": 2,
        "total_steps": 8,
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 1e-5,
        "epoch": 0.5,
        "percentage": 25.0,
        "elapsed_time": "1:06:40",
        "elapsed_seconds": 4000.0,
        "remaining_time": "3:20:00",
        "throughput": 1.5,
        "total_tokens": 6000,
    }
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", line[k]) for k in ("elapsed_time", "remaining_time"))


def test_rewards_of_pairs_stand_in_the_line(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path))
    log.on_train_begin(EVALUATES, state(0), None)
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": 0.25, "rewards/margins": 0.25}
    log.on_log(None, state(1), None, logs={"loss": 1.0, **rewards, "logps/chosen": -3.0})
    (line,) = read_log(tmp_path)
    assert {name: line.get(name) for name in rewards} == rewards and "logps/chosen" not in line


@pytest.mark.parametrize(
    ("logs", "fields"),
    [
        ({"loss": 1.0, "rewards/accuracies": 0.75}, {"loss": 1.0, "accuracy": 0.75}),
        ({"loss": 1.0, "accuracy": 0.5}, {"loss": 1.0, "accuracy": 0.5}),
        (
            {"eval_loss": 2.0, "eval_rewards/accuracies": 0.25},
            {"eval_loss": 2.0, "eval_accuracy": 0.25},
        ),
        ({"eval_loss": 2.0, "eval_accuracy": 0.125}, {"eval_loss": 2.0, "eval_accuracy": 0.125}),
    ],
)
def test_names_of_the_measures(
    logs: dict[str, float], fields: dict[str, float], tmp_path: Path
) -> None:
    log = LogFile(str(tmp_path))
    log.on_train_begin(EVALUATES, state(0), None)
    log.on_log(None, state(1), None, logs=logs)
    (line,) = read_log(tmp_path)
    measures = {
        "loss",
        "eval_loss",
        "accuracy",
        "eval_accuracy",
        "lr",
        "grad_norm",
        "reward",
        "throughput",
        "total_tokens",
    }
    assert {k: v for k, v in line.items() if k in measures} == fields


def test_a_resumed_run_reckons_from_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock(monkeypatch)
    # step 7 was made before a kill and is made again; the kill cut the line of step 8
    lines = [{"current_steps": 6}, {"current_steps": 6, "eval_loss": 1.0}, {"current_steps": 7}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"current_st'
    (tmp_path / LOG_FILE).write_text(text)
    log = LogFile(str(tmp_path))
    # the checkpoint of step 6 was saved before that step's evaluation, which comes again
    log.on_train_begin(
        EVALUATES, state(6, tokens=6000, log_history=[{"step": 6, "loss": 1.0}]), None
    )
    now.t += 10
    log.on_log(None, state(7), None, logs={"loss": 1.0, "num_input_tokens_seen": 7000})
    first, line = read_log(tmp_path)
    assert first == {"current_steps": 6}
    assert (line["remaining_time"], line["throughput"], line["total_tokens"]) == (
        "0:00:10",
        100.0,
        7000,
    )


def test_the_evaluation_after_the_last_step_stands_once(tmp_path: Path) -> None:
    """Of a run that was killed after its last checkpoint: it evaluates again."""
    lines = [{"current_steps": 6}, {"current_steps": 9}, {"current_steps": 9, "eval_a_loss": 1.0}]
    history = [{"step": 6}, {"step": 9}, {"step": 9}]
    for evaluates, kept in ((True, lines[:2]), (False, lines)):
        (tmp_path / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        args = types.SimpleNamespace(do_eval=evaluates)
        LogFile(str(tmp_path)).on_train_begin(args, state(9, total=9, log_history=history), None)
        assert read_log(tmp_path) == kept


def test_a_run_that_begins_replaces_an_old_file(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"current_steps": 6}\n')
    log = LogFile(str(tmp_path))
    log.on_train_begin(EVALUATES, state(0), None)
    log.on_log(None, state(1), None, logs={"loss": 1.0})
    assert [line["current_steps"] for line in read_log(tmp_path)] == [1]


def test_other_processes_and_the_closing_summary_write_nothing(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path))
    log.on_train_begin(EVALUATES, state(0, main=False), None)
    log.on_log(None, state(1, main=False), None, logs={"loss": 1.0})
    log.on_log(None, state(1), None, logs={"train_loss": 1.0})
    assert not (tmp_path / LOG_FILE).exists()


def test_functions_at_the_start_run_in_order() -> None:
    seen: list[int] = []
    AtStart(lambda: seen.append(1), lambda: seen.append(2)).on_train_begin(None, None, None)
    assert seen == [1, 2]


def test_curves_become_pictures(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [
        {"step": i, "loss": 2.0 - i / 10, "rewards/accuracies": i / 10} for i in range(5)
    ]
    history.append({"step": 4, "train_runtime": 1.0})
    files = plot_history(history, tmp_path, ("loss", "eval_loss", "rewards/accuracies"))
    assert [f.name for f in files] == ["training_loss.png", "training_rewards_accuracies.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 2000 for f in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)
    overlay(
        {"a": [(0, 1.0), (1, 0.5)], "b": [(0, 1.0), (1, 0.5)]}, tmp_path / "both.png", title="t"
    )
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing() -> None:
    assert smooth([]) == [] and smooth([3.0]) == [3.0]
    assert smooth([2.0] * 9) == pytest.approx([2.0] * 9)
    noisy = [float(i % 2) for i in range(200)]
    late = smooth(noisy)[100:]
    assert all(0.4 < v < 0.6 for v in late)
    assert json.dumps(smooth([1.0, 2.0]))  # plain numbers


def test_a_log_file_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "longfactory")
    log = LogFile(str(tmp_path))
    log.on_train_begin(EVALUATES, state(0), None)
    (tmp_path / LOG_FILE).mkdir()  # as a full disk would, opening it raises OSError
    logger = logging.getLogger("longfactory")
    logger.addHandler(caplog.handler)
    for step in (1, 2):
        log.on_log(None, state(step), None, logs={"loss": 1.0})
    logger.removeHandler(caplog.handler)
    assert (
        len({r for r in caplog.records if "cannot be written (Is a directory)" in r.getMessage()})
        == 1
    )


def test_a_tracker_that_fails_ends_the_run_before_its_first_step_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Board(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no key")

        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> Any:
            if logs:
                raise OSError("the network is gone")
            return "control"

    caplog.set_level(logging.WARNING, "longfactory")
    Board.__module__ = "transformers.integrations.board"
    own = AtStart()
    handler = types.SimpleNamespace(callbacks=[Board(), own])
    report_failures(handler)
    board = handler.callbacks[0]
    assert isinstance(board, Reported) and handler.callbacks[1] is own
    with pytest.raises(RuntimeError, match="no key"):
        board.on_train_begin(None, state(0), None)
    with pytest.raises(OSError, match="the network is gone"):
        board.on_log(None, state(0), None, logs={"loss": 1})
    logger = logging.getLogger("longfactory")
    logger.addHandler(caplog.handler)
    for step in (1, 2):
        board.on_log(None, state(step), None, logs={"loss": 1})
    logger.removeHandler(caplog.handler)
    assert (
        len(
            {
                r
                for r in caplog.records
                if "report_to: Board failed (OSError: the network is gone)" in r.getMessage()
            }
        )
        == 1
    )
    assert board.on_log(None, state(3), None) == "control"


def test_the_profiler_writes_a_trace_of_the_steps_it_was_asked_for(tmp_path: Path) -> None:
    """Two recordings of two steps, each after one that is left out and one to warm up; where the
    folder cannot be made, a warning and no error.
    """

    def run(folder: Path) -> None:
        state = types.SimpleNamespace(global_step=0)
        profiler = Profiler(folder, wait=1, warmup=1, active=2, repeat=2, record_shapes=True)
        profiler.on_train_begin(None, state, None)
        for _ in range(10):
            torch.ones(7, 3) @ torch.ones(3, 5)
            state.global_step += 1
            profiler.on_step_end(None, state, None)
        profiler.on_train_end(None, state, None)

    run(tmp_path / "traces")
    files = sorted((tmp_path / "traces").iterdir())
    assert [f.name for f in files] == ["trace_rank0_step4.json", "trace_rank0_step8.json"]
    events = json.loads(files[0].read_text())["traceEvents"]
    products = [e for e in events if e.get("name") == "aten::mm"]
    assert len(products) == 2 and products[0]["args"]["Input Dims"][:2] == [[7, 3], [3, 5]]
    (tmp_path / "file").write_text("")
    run(tmp_path / "file" / "inside")


class Node:
    """An object that refers to itself: the collector alone can find it."""

    def __init__(self) -> None:
        self.own = self


def test_the_collector_leaves_alone_what_is_there_after_the_first_step() -> None:
    added: list[TrainerCallback] = []
    with objects_frozen(types.SimpleNamespace(add_callback=added.append)):
        (freeze,) = added
        garbage, kept = weakref.ref(Node()), Node()
        freeze.on_step_end(None, state(1), None)
        frozen = gc.get_freeze_count()
        assert garbage() is None and frozen > 10_000
        later, of_start = weakref.ref(Node()), weakref.ref(kept)
        del kept
        freeze.on_step_end(None, state(2), None)
        gc.collect()
        assert later() is None and of_start() is not None
        assert gc.get_freeze_count() <= frozen
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert of_start() is None


def test_objects_are_thawed_when_a_run_fails() -> None:
    added: list[TrainerCallback] = []
    with (
        pytest.raises(ValueError),
        objects_frozen(types.SimpleNamespace(add_callback=added.append)),
    ):
        added[0].on_step_end(None, state(1), None)
        raise ValueError
    assert gc.get_freeze_count() == 0
