"""A rank that is stopped (SIGSTOP), that sleeps, or that never comes, in every phase: the run ends
within the stated time and names it.
"""

from __future__ import annotations

import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_processes import STARTED, descendants, keys, make_home, problems, result, send, start

HEARTBEAT = 6
LIMIT = 8
"""Seconds of the phase in which a rank sleeps."""
SLACK = 25
"""Seconds from a limit to the end of the run, on a busy machine: 30 are promised."""
MOMENTS = ("step", "save", "load", "tokenise")


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for number in range(count):
        how = ("stopped", "stopped", "sleeps", "missing")[number % 4]
        yield {
            "number": number,
            "how": how,
            "moment": "start" if how == "missing" else MOMENTS[number // 4 % 4],
            "rank": draw.randrange(2),
        }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    make_home(home)
    out, begun = home / "out", time.monotonic()
    how, moment, rank = case["how"], case["moment"], case["rank"]
    if how == "missing":
        return _missing(home, out, rank)
    limits: dict[str, Any] = {"heartbeat_timeout": HEARTBEAT}
    slow = {moment: 0.3}
    if how == "sleeps":
        key = {"step": "step_timeout", "save": "save_timeout"}.get(moment, "startup_timeout")
        limits = {key: LIMIT if key != "startup_timeout" else 2 * LIMIT}
        slow = {moment: 600.0}
    # The first step is start-up, which has a limit of its own.
    variables = {"SURVIVAL_FROM": "3"} if how == "sleeps" else {}
    sleeper = rank if how == "sleeps" and moment != "tokenise" else None
    command = start(home, keys(home, out, **limits), slow, sleeper, **variables)
    if moment == "tokenise":
        # Whoever comes first tokenises; it is that one which is stopped.
        reached = command.until(lambda: any(command.reached(moment, r) for r in (0, 1)))
        rank = next((r for r in (0, 1) if command.reached(moment, r)), rank)
    elif moment == "step" and how == "stopped":
        reached = command.until(lambda: command.steps() >= 2)
    else:
        reached = command.until(lambda: command.reached(moment, rank))
    if not reached:
        command.kill()
        return result(False, begun, 0, f"{moment} was not reached", command)
    pids = [command.process.pid, *descendants(command.process.pid)]
    at = time.monotonic()
    if how == "stopped":
        send(command.workers()[rank], signal.SIGSTOP)
    limit = max(limits.values())
    status = command.wait(limit + 3 * SLACK)
    took = time.monotonic() - at
    text = command.text()
    wrong = problems(command, pids)
    if status != 76:
        wrong.append(f"exit status {status}")
    named = (
        f"No sign of life from rank {rank} "
        if how == "stopped"
        else f"rank {rank} holds up the others"
    )
    if named not in text:
        wrong.append(f"not told: {named!r}")
    if not list(out.glob("stacks/rank-*.txt")):
        wrong.append("no stacks")
    words = "; ".join(wrong) or f"exit 76 after {took:.1f} s, rank {rank} named"
    done = result(not wrong, begun, limit + SLACK, words, command)
    return {**done, "seconds": took}


def _missing(home: Path, out: Path, rank: int) -> dict[str, Any]:
    """One of two machines is never started."""
    port = free_port()
    given = keys(home, out, nproc_per_node=1, startup_timeout=LIMIT)
    begun = time.monotonic()
    command = start(
        home,
        given,
        NNODES="2",
        NODE_RANK=str(1 - rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    status = command.wait(LIMIT + STARTED)
    wrong = problems(command, [command.process.pid])
    if status not in (76, 77):
        wrong.append(f"exit status {status}")
    words = "; ".join(wrong) or f"exit {status}: the other machine was never there"
    return result(not wrong, begun, LIMIT + SLACK + 15, words, command)
