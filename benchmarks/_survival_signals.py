"""A signal that asks for a stop, in every phase, to every process; then the same command."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_processes import (
    STARTED,
    Command,
    catches,
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

GRACE = 30
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
MOMENTS = ("step", "step", "save", "load", "tokenise", "start")
TARGETS = ("launcher", "group", "rank 0", "rank 1", "tree")


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for number in range(count):
        processes = 1 if number % 5 == 4 else 2
        yield {
            "number": number,
            "processes": processes,
            "moment": MOMENTS[number % len(MOMENTS)],
            "signal": draw.choice(SIGNALS),
            "to": draw.choice(TARGETS if processes == 2 else ("launcher", "group")),
            "second": draw.random() < 0.15,
        }


def targets(command: Command, to: str) -> list[int]:
    """Process ids that the signal goes to; the group of the command holds the launcher alone, since
    each rank has a session of its own.
    """
    pid = command.process.pid
    if to in ("launcher", "group"):
        return [pid]
    if to == "tree":
        return [pid, *descendants(pid)]
    workers = command.workers()
    return [workers[int(to.split()[1])]]


def told(command: Command, case: dict[str, Any]) -> list[int]:
    """Process ids that a signal at the start goes to, once all are there; else none, which is not
    yet.
    """
    if len(command.workers()) < case["processes"] and case["processes"] > 1:
        return [0]
    return targets(command, case["to"])


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    make_home(home)
    out, begun = home / "out", time.monotonic()
    processes, moment = case["processes"], case["moment"]
    given = keys(home, out, nproc_per_node=processes, signal_grace=GRACE)
    slow = {"step": 0.05} if moment in ("step", "start") else {moment: 1.5, "step": 0.05}
    command = start(home, given, slow)
    if moment == "step":
        reached = command.until(lambda: command.steps() >= 2)
    elif moment == "start":
        # Before its first lines have run, a process has Python's own answer to a signal.
        # It has one for SIGINT anyway; all are installed together.
        reached = command.until(
            lambda: all(catches(pid, signal.SIGUSR1) for pid in told(command, case))
        )
        time.sleep(0.2)
    else:
        reached = command.until(lambda: command.reached(moment, 0))
    if not reached:
        command.kill()
        return result(False, begun, 0, f"{moment} was not reached", command)
    pids = [command.process.pid, *descendants(command.process.pid)]
    number = int(getattr(signal, case["signal"]))
    for pid in targets(command, case["to"]):
        send(pid, number)
    signalled = time.monotonic()
    if case["second"]:
        time.sleep(1.2)
        for pid in targets(command, "launcher"):
            send(pid, number)
    status = command.wait(GRACE + 30)
    took = time.monotonic() - signalled
    wrong = problems(command, pids)
    allowed = {75} if not case["second"] else {75, 128 + number}
    if status not in allowed:
        wrong.append(f"exit status {status}")
    if status == 75:
        trained = moment in ("step", "save")
        found = checkpoints(out)
        if trained and not found:
            wrong.append("no checkpoint")
        if command.text().count("Stopped by") != 1:
            wrong.append(f"{command.text().count('Stopped by')} messages")
    if (out / "train_results.json").exists() or (out / "model.safetensors").exists():
        wrong.append("the stopped run claims to be complete")
    if not wrong:
        again = start(home, given, {"step": 0.0}, name="again")
        end = again.wait(3 * STARTED)
        if end != 0:
            wrong.append(f"the same command ended with {end}: {again.text()[-300:]}")
        elif differs := same_end(out, processes):
            wrong.append(differs)
    words = f"exit {status} after {took:.1f} s; " + ("; ".join(wrong) or "went on to the same end")
    done = result(not wrong, begun, GRACE + 15, words, command, stopping=took, status=status)
    return {**done, "seconds": took}
