"""Kills, signals, stopped ranks and a long save on two GPUs: NCCL and FSDP2. Independent cases run
side by side: each needs little of the devices.
"""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from _survival_processes import (
    Command,
    checkpoints,
    descendants,
    keys,
    make_home,
    problems,
    send,
    start,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

STARTED = 200.0
"""Seconds until several runs side by side train."""
SLOW = {"step": 0.3}


def run(
    home: Path,
    name: str,
    slow: dict[str, float],
    rank: int | None = None,
    restarts: int = 0,
    **changes: Any,
) -> Command:
    """The command on two GPUs; `slow` and `rank` are those of `start`."""
    given: dict[str, Any] = {
        "use_cpu": None,
        "bf16": True,
        "sharding": "fsdp2",
        "max_steps": 10,
        "save_steps": 3,
        "heartbeat_timeout": 8,
        "signal_grace": 60,
        **changes,
    }
    variables = {"MAX_RESTARTS": str(restarts)}
    return start(home, keys(home, home / name, **given), slow, rank, name=name, **variables)


def finish(command: Command, wanted: int, seconds: float = 120.0) -> str:
    """Waits for the end; returns its output."""
    status = command.wait(seconds)
    assert status == wanted, f"{status} != {wanted}: {command.text()[-3000:]}"
    return command.text()


def killed(home: Path, rank: int, moment: str) -> None:
    """SIGKILL of a rank with one restart: the run ends complete."""
    slow = {**SLOW, **({"save": 1.0} if moment == "save" else {})}
    command = run(home, f"killed-{rank}-{moment}", slow, restarts=1)
    at = {"step": lambda: command.steps() >= 4, "save": lambda: command.reached("save", rank)}
    assert command.until(at[moment], STARTED), command.text()[-3000:]
    send(command.workers()[rank], signal.SIGKILL)
    text = finish(command, 0, STARTED)
    assert "restart 1 of 1" in text and (command.out / "train_results.json").exists()


def signalled(home: Path, number: int, to: str) -> None:
    """A signal while it trains: a checkpoint, exit status 75, and the same command ends complete."""
    name = f"signalled-{number}-{to}"
    command = run(home, name, SLOW)
    assert command.until(lambda: command.steps() >= 2, STARTED), command.text()[-3000:]
    pids = [command.process.pid, *descendants(command.process.pid)]
    target = command.process.pid if to == "launcher" else command.workers()[int(to)]
    send(target, number)
    text = finish(command, 75, 75)
    assert checkpoints(command.out) and text.count("Stopped by") == 1
    assert not problems(command, pids)
    finish(run(home, name, {}), 0, STARTED)
    assert (command.out / "train_results.json").exists()


def stopped(home: Path, rank: int, moment: str) -> None:
    """SIGSTOP of a rank: exit status 76, the rank named."""
    slow = {**SLOW, **({"save": 1.0} if moment == "save" else {})}
    command = run(home, f"stopped-{rank}-{moment}", slow)
    at = {"step": lambda: command.steps() >= 2, "save": lambda: command.reached("save", rank)}
    assert command.until(at[moment], STARTED), command.text()[-3000:]
    pids = [command.process.pid, *descendants(command.process.pid)]
    send(command.workers()[rank], signal.SIGSTOP)
    begun = time.monotonic()
    text = finish(command, 76, 60)
    assert time.monotonic() - begun < 8 + 30
    assert f"No sign of life from rank {rank} " in text and not problems(command, pids)


def long_save(home: Path) -> None:
    """A save of 60 s on one rank, with a step limit of 30 s and a `ddp_timeout` of 30 s."""
    limits = {"step_timeout": 30, "ddp_timeout": 30}
    command = run(home, "long-save", {"save": 60.0}, 0, max_steps=3, **limits)
    finish(command, 0, STARTED + 120)
    assert checkpoints(command.out) == [3] and (command.out / "train_results.json").exists()


def side_by_side(*cases: Callable[[], None]) -> None:
    """Runs the cases in threads; raises with all that failed."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        futures = [pool.submit(case) for case in cases]
    errors = [f.exception() for f in futures if f.exception() is not None]
    assert not errors, "\n\n".join(str(e)[-3000:] for e in errors)


@pytest.mark.timeout(600)
def test_kills_and_a_long_save(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    side_by_side(
        lambda: long_save(home),
        lambda: killed(home, 0, "step"),
        lambda: killed(home, 1, "save"),
    )


@pytest.mark.timeout(600)
def test_signals(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    side_by_side(
        lambda: signalled(home, signal.SIGTERM, "launcher"),
        lambda: signalled(home, signal.SIGUSR1, "1"),
        lambda: signalled(home, signal.SIGINT, "0"),
    )


@pytest.mark.timeout(600)
def test_stopped_ranks(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    side_by_side(
        lambda: stopped(home, 0, "step"),
        lambda: stopped(home, 1, "step"),
        lambda: stopped(home, 1, "save"),
    )
