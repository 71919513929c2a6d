"""A rank is killed, in every phase, with MAX_RESTARTS set: the run ends as one that was never hurt."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_processes import (
    STARTED,
    checkpoints,
    descendants,
    keys,
    make_home,
    problems,
    result,
    same_end,
    send,
    start,
)

MOMENTS = ("step", "step", "save", "load", "start")
LIMIT = 5 * STARTED


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for number in range(count):
        yield {
            "number": number,
            "moment": MOMENTS[number % len(MOMENTS)],
            "rank": draw.randrange(2),
            "restarts": draw.choice((1, 2)),
            "kills": 1 if number % 4 else 2,
            "overwrite": draw.random() < 0.3,
        }


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    make_home(home)
    out, begun = home / "out", time.monotonic()
    moment, kills = case["moment"], min(case["kills"], case["restarts"])
    given = keys(home, out, save_steps=2, overwrite_output_dir=case["overwrite"])
    slow = {"step": 0.1, **({moment: 1.0} if moment in ("save", "load") else {})}
    command = start(home, given, slow, MAX_RESTARTS=str(case["restarts"]))
    pids: set[int] = set()
    killed: set[int] = set()
    for _ in range(kills):
        seen = command.steps()

        def reached(seen: int = seen) -> bool:
            if len(command.workers()) < 2 or set(command.workers().values()) & killed:
                return False
            if moment == "step":
                return command.steps() >= seen + 3
            if moment == "start":
                return True
            return command.reached(moment, case["rank"])

        if not command.until(reached, 2 * STARTED):
            command.kill()
            return result(False, begun, LIMIT, f"{moment} was not reached", command)
        if moment == "start":
            time.sleep(2)
        for mark in command.marks.iterdir():
            mark.unlink()
        pids |= {command.process.pid, *descendants(command.process.pid)}
        killed = set(command.workers().values())
        send(command.workers()[case["rank"]], signal.SIGKILL)
    status = command.wait(LIMIT)
    text = command.text()
    wrong = problems(command, list(pids))
    if status != 0:
        wrong.append(f"exit status {status}")
    if text.count("(MAX_RESTARTS)") != kills:
        wrong.append(f"{text.count('(MAX_RESTARTS)')} restarts told")
    if not wrong and (differs := same_end(out, 2)):
        wrong.append(differs)
    words = "; ".join(wrong) or f"{kills} kills of rank {case['rank']}, the same end"
    return result(not wrong, begun, LIMIT, words, command, checkpoints=checkpoints(out))
