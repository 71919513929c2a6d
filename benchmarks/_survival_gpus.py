"""Kills, signals, stopped ranks and a long save on two GPUs: NCCL and FSDP2.

A case is a batch of runs side by side, since each needs little of the devices and most of its time
is its start: 3 kills, 3 signals, 2 stopped ranks, or a long save among kills.
"""

from __future__ import annotations

import concurrent.futures
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _survival_processes import (
    Command,
    catches,
    checkpoints,
    command_line,
    descendants,
    keys,
    make_home,
    problems,
    send,
    start,
)

STARTED = 240.0
"""Seconds until several runs side by side train."""
SLOW = {"step": 0.3}
HEARTBEAT = 8
BATCHES = (
    "long save",
    "signals",
    "stopped",
    "kills",
    "signals",
    "stopped",
    "kills",
    "kills",
    "kills",
)
"""Nine batches: 12 kills and more, 6 signals, 4 stopped ranks, the long save."""


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for number in range(count):
        batch = BATCHES[number % len(BATCHES)]
        yield {"number": number, "batch": batch, "seed": draw.randrange(1 << 16)}


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    make_home(home)
    begun = time.monotonic()
    runs = batch(case["batch"], case["seed"], home)
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        ends = list(pool.map(lambda run: run(), runs))
    wrong = [end for end in ends if end]
    words = " || ".join(wrong) or f"{len(runs)} runs ended as specified"
    seconds = time.monotonic() - begun
    return {
        "ok": not wrong,
        "seconds": seconds,
        "limit": 3 * STARTED,
        "end": words,
        "trials": len(runs),
    }


def batch(name: str, seed: int, home: Path) -> list[Callable[[], str]]:
    """The runs of a batch, each of which returns what was wrong with it."""
    draw = random.Random(seed)
    moments = [draw.choice(("step", "save", "load")) for _ in range(3)]
    if name == "long save":
        return [
            lambda: long_save(home),
            lambda: killed(home, 0, "step", 0),
            lambda: killed(home, 1, "save", 1),
        ]
    if name == "kills":
        return [
            lambda k=k: killed(home, (seed + k) % 2, moments[k], k)  # type: ignore[misc]
            for k in range(3)
        ]
    if name == "signals":
        return [
            lambda: signalled(home, signal.SIGTERM, "launcher"),
            lambda: signalled(home, signal.SIGUSR1, "1"),
            lambda: signalled(home, signal.SIGINT, "0"),
        ]
    return [lambda: stopped(home, seed % 2, "step"), lambda: stopped(home, 1, "save")]


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
        "heartbeat_timeout": HEARTBEAT,
        "signal_grace": 60,
        **changes,
    }
    variables = {"MAX_RESTARTS": str(restarts)}
    return start(home, keys(home, home / name, **given), slow, rank, name=name, **variables)


def wrong(command: Command, *found: str) -> str:
    """What was wrong, with the end of the output; empty where nothing was."""
    said = "; ".join(f for f in found if f)
    return f"{command.out.name}: {said}: {command.text()[-1500:]}" if said else ""


def reach(command: Command, moment: str, rank: int) -> str:
    """Waits until a rank is somewhere: in its fourth step, in a save, loading."""

    def there() -> bool:
        return command.steps() >= 3 if moment == "step" else command.reached(moment, rank)

    if command.until(there, STARTED):
        return ""
    command.kill()
    return f"{moment} was not reached"


def complete(command: Command, seconds: float) -> str:
    status = command.wait(seconds)
    if status != 0:
        return f"exit status {status}"
    return "" if (command.out / "train_results.json").exists() else "no train_results.json"


def killed(home: Path, rank: int, moment: str, number: int) -> str:
    """SIGKILL of a rank with one restart: the run ends complete."""
    slow = {**SLOW, **({moment: 1.0} if moment != "step" else {})}
    command = run(home, f"killed-{number}", slow, restarts=1)
    if missed := reach(command, moment, rank):
        return wrong(command, missed)
    send(command.workers()[rank], signal.SIGKILL)
    end = complete(command, 2 * STARTED)
    told = "" if "restart 1 of 1" in command.text() else "no restart was told"
    return wrong(command, end, told)


def signalled(home: Path, number: int, to: str) -> str:
    """A signal while it trains: a checkpoint, exit status 75, and the same command ends complete."""
    name = f"signalled-{to}"
    command = run(home, name, SLOW)
    if missed := reach(command, "step", 0):
        return wrong(command, missed)
    pids = [command.process.pid, *descendants(command.process.pid)]
    to_pid = command.process.pid if to == "launcher" else command.workers()[int(to)]
    heard = catches(to_pid, number)
    sent, at = send(to_pid, number), command.steps()
    status = command.wait(75)
    text = command.text()
    bad = wrong(
        command,
        "" if sent and heard else f"sent to {to_pid}: {sent}, it listened: {heard}",
        "" if status == 75 else f"after step {at}, {command_line(to_pid)[:80]!r}",
        "" if status == 75 else f"exit status {status}",
        "" if checkpoints(command.out) else "no checkpoint",
        "" if text.count("Stopped by") == 1 else f"{text.count('Stopped by')} messages",
        *problems(command, pids),
    )
    if bad:
        return bad
    again = run(home, name, {})
    return wrong(again, complete(again, STARTED))


def stopped(home: Path, rank: int, moment: str) -> str:
    """SIGSTOP of a rank: exit status 76, the rank named."""
    slow = {**SLOW, **({"save": 1.0} if moment == "save" else {})}
    command = run(home, f"stopped-{rank}-{moment}", slow)
    if missed := reach(command, moment, rank):
        return wrong(command, missed)
    pids = [command.process.pid, *descendants(command.process.pid)]
    send(command.workers()[rank], signal.SIGSTOP)
    begun = time.monotonic()
    status = command.wait(90)
    took = time.monotonic() - begun
    named = f"No sign of life from rank {rank} " in command.text()
    return wrong(
        command,
        "" if status == 76 else f"exit status {status}",
        "" if took < HEARTBEAT + 30 else f"it took {took:.0f} s",
        "" if named else "the rank is not named",
        *problems(command, pids),
    )


def long_save(home: Path) -> str:
    """A save of 60 s on one rank, with a step limit of 30 s and a `ddp_timeout` of 30 s."""
    limits = {"step_timeout": 30, "ddp_timeout": 30}
    command = run(home, "long-save", {"save": 60.0}, 0, max_steps=3, **limits)
    end = complete(command, STARTED + 120)
    found = checkpoints(command.out)
    return wrong(command, end, "" if found == [3] else f"checkpoints {found}")
