"""Whom the others wait for, and the end of a process that does not move."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longfactory import progress
from longfactory.config import from_mapping
from longfactory.train.survival import watch as watch_module
from longfactory.train.survival.board import Board
from longfactory.train.survival.start import limits_of
from longfactory.train.survival.watch import Limits, Watch, culprits, main_thread_is_at, report
from longfactory.train.survival.words import lost_connection


def rank(number: int, step: int = 3, collective: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "rank": number,
        "host": "host",
        "pid": 1,
        "phase": "step",
        "detail": "training",
        "step": step,
        "age": 40.0,
        "place": "trainer.py:9 in training_step",
        "collective": collective,
        **more,
    }


def test_the_rank_that_others_wait_for() -> None:
    waiting = {0: rank(0, collective="all_reduce"), 1: rank(1)}
    assert culprits(waiting, {}, 2) == [1]
    assert culprits({0: rank(0, 3), 1: rank(1, 2, "barrier")}, {}, 2) == [1]
    assert culprits({0: rank(0, collective="barrier")}, {}, 2) == [1]  # it has never come
    assert culprits(waiting, {0: rank(0)}, 2) == [0]  # without a sign of life
    assert culprits({0: rank(0), 1: rank(1)}, {}, 2) == []


def test_the_report_names_rank_phase_limit_and_collective() -> None:
    text = report(
        {0: rank(0, collective="all_reduce"), 1: rank(1)}, {}, 2, Limits(step=30), Path("out")
    )
    assert "40 s in step (step_timeout: 30): rank 1 holds up the others" in text
    assert "in all_reduce, called by trainer.py:9" in text and "out/rank-*.txt" in text
    lost = report({0: rank(0)}, {1: rank(1, detail="saving")}, 2, Limits(heartbeat=6), Path("o"))
    assert "No sign of life from rank 1 for 6 s (heartbeat_timeout)" in lost
    assert "last seen in step 3, saving" in lost


def test_the_place_of_the_main_thread() -> None:
    place, collective = main_thread_is_at()
    assert "test_watch" in place or "longfactory" in place or ".py:" in place
    assert collective is None


def test_limits_follow_from_the_keys() -> None:
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere/out"}
    cfg = from_mapping({**keys, "ddp_timeout": 180000000, "save_timeout": 7000})
    assert cfg.step_timeout == 1800 and cfg.longest_timeout == 7000
    assert limits_of(cfg).save == 7000
    assert from_mapping({**keys, "ddp_timeout": 60}).step_timeout == 60
    assert from_mapping({**keys, "ddp_timeout": 60, "step_timeout": 90}).step_timeout == 90


def test_a_phase_within_start_up_stays_start_up() -> None:
    progress.enter("start-up", "loading", step=0)
    with progress.within("evaluation", "the reference"):
        assert progress.NOW.phase == "start-up" and progress.NOW.detail == "the reference"
    progress.enter("step", "training", step=4)
    with progress.within("save", "saving"):
        assert progress.NOW.phase == "save"
    assert progress.NOW.phase == "step" and progress.NOW.detail == "training"


ALONE = """
import sys, time
from pathlib import Path
from longfactory import progress
from longfactory.train.survival.watch import Limits, Watch
from longfactory.train.survival.words import lost_connection

watch = Watch(0, 1)
watch.start()
watch.configure(Limits(step=1.0), ("SIGTERM",), Path(sys.argv[1]))
progress.enter("step", "training", step=7)

def stuck():
    time.sleep(60)

stuck()
"""


@pytest.mark.processes
def test_a_process_that_does_not_move_ends_with_its_stacks(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 76 and time.monotonic() - begun < 20
    assert "(step_timeout: 1)" in done.stderr and "step 7, training" in done.stderr
    assert "in stuck" in (tmp_path / "rank-0.txt").read_text()


def test_a_rank_may_wait_for_one_that_saves_longer_than_its_own_limit() -> None:
    watch = Watch(0, 2)
    try:
        watch.limits = Limits(step=30, save=3600)
        board = Board(dist.HashStore(), 0, 2)  # type: ignore[arg-type]
        board.put("beat/0", [1, rank(0)])
        board.put("beat/1", [1, rank(1, phase="save", age=50.0)])
        assert watch._waits_for_a_longer_phase(board, 30)
        board.put("beat/1", [2, rank(1, phase="save", age=3601.0)])
        assert not watch._waits_for_a_longer_phase(board, 30)
        board.put("beat/1", [3, rank(1, phase="step", age=20.0)])
        assert not watch._waits_for_a_longer_phase(board, 30)
    finally:
        watch.signals.close()


def test_who_waits_for_a_file_does_not_hold_up_the_others() -> None:
    tokenising = rank(0, 0, phase="start-up", detail="tokenising")
    waiting = rank(1, 0, phase="start-up", detail="waiting for process 9 on host to tokenise")
    assert culprits({0: tokenising, 1: waiting}, {}, 2) == [0]


def test_a_lost_connection_is_told_from_a_failure() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4")
    assert lost_connection(gloo)
    assert not lost_connection(RuntimeError("shape mismatch"))
    assert not lost_connection(ValueError("Connection closed by peer"))


def test_a_rank_without_a_sign_of_life_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, clock = Watch(0, 2), [100.0]
    ended: list[set[int]] = []
    try:
        monkeypatch.setattr(watch_module.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(
            watch, "_end_stalled", lambda board, stall: ended.append(set(stall["lost"]))
        )
        watch.limits = Limits(heartbeat=10)
        board = Board(dist.HashStore(), 0, 2)  # type: ignore[arg-type]
        for turn in (1, 2, 3):
            board.put("beat/1", [turn, rank(1)])
            for _ in range(2):
                watch._exchange(board)
            clock[0] += 9.0
        assert ended == []
        clock[0] += 9.0
        for _ in range(2):
            watch._exchange(board)
        assert ended == [{"1"}]
    finally:
        watch.signals.close()


def test_a_step_over_its_limit_ends_unless_another_rank_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(0, 2)
    ended: list[Any] = []
    try:
        monkeypatch.setattr(watch, "_end_stalled", lambda board, stall: ended.append(stall))
        watch.limits = Limits(step=30, save=3600)
        watch._board = board = Board(dist.HashStore(), 0, 2)  # type: ignore[arg-type]
        progress.enter("step", "training", step=3)
        watch._check_limits()
        assert ended == []
        board.put("beat/1", [1, rank(1, phase="save", age=50.0)])
        monkeypatch.setattr(progress.NOW, "since", progress.NOW.since - 31)
        watch._check_limits()
        assert ended == []
        board.put("beat/1", [2, rank(1, phase="step", age=5.0)])
        watch._check_limits()
        assert len(ended) == 1
    finally:
        watch.signals.close()
