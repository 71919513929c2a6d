"""Chains of SIGKILL and the same command again, until it ends: then every file must be that of the
uninterrupted run, and nothing may be left behind.

Kills come at random moments from outside, and at events of a rank (a step, a file written, put on
the disk or renamed), counted in the uninterrupted run; with `cut` the file is left half written.
Whether a kill lay inside a save is told by the temporary folder that stands there afterwards.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _survival_runs as runs

CHAIN = 3
VICTIMS = ("rank", "tree", "launcher")


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` chains of `CHAIN` kills each. Every twelfth is of the real command with torchrun."""
    draw = random.Random(seed)
    for number, run in zip(range(count), runs.runs_in_turn(), strict=False):
        kills = [
            {
                "how": draw.choice(["save", "save", "event", "time"]),
                "victim": draw.choice(VICTIMS),
                "rank": draw.randrange(runs.RUNS[run][0]),
                "at": round(draw.random() * (1.0 if i == 0 else 0.7), 4),
                "cut": draw.random() < 0.5,
            }
            for i in range(CHAIN)
        ]
        yield {
            "run": run,
            "seed": seed,
            "number": number,
            "kills": kills,
            "real": number % 12 == 11,
        }


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    """Kills, starts again, and compares. `trials` are the kills that struck; `in_save` those inside
    a save; `phases` what each struck.
    """
    run = case["run"]
    _, expected, events, seconds = runs.reference(run)
    begun, phases = time.monotonic(), []
    starts, status = 0, None
    limit = 120.0 + 60.0 * (len(case["kills"]) + 1) * (2 if case["real"] else 1)
    for kill in case["kills"]:
        strike = _strike_command if case["real"] else _strike
        struck, status = strike(run, home, kill, events, seconds)
        starts += 1
        if struck is None:
            break
        phases.append(struck)
    if status != 0:
        status = _to_its_end(run, home, case["real"])
        starts += 1
    wrong = [] if status == 0 else [f"rc {status}: {_tail(home)}"]
    if status == 0:
        wrong = runs.differences(expected, runs.state_of(home / "out"))
        left = {p.name for p in home.iterdir()} - {"out", "cache", "log", "killed"}
        wrong += [f"{name} is left behind" for name in left if not name.startswith("events-")]
    return {
        "ok": not wrong,
        "group": run,
        "seconds": time.monotonic() - begun,
        "limit": limit,
        "end": "; ".join(wrong[:6]) or f"equal after {len(phases)} kills, {starts} starts",
        "trials": len(phases),
        "in_save": sum(saving for _, saving in phases),
        "phases": [label for label, _ in phases],
    }


def _strike(
    run: str, home: Path, kill: dict[str, Any], events: list[list[Any]], seconds: float
) -> tuple[tuple[str, bool] | None, int | None]:
    """Starts the run and kills it. ((phase, inside a save), status); (None, 0) where the run came
    to its end before.
    """
    plan = None
    if kill["how"] != "time":
        numbers = [
            i
            for i, (_, saving) in enumerate(events[kill["rank"]], 1)
            if saving or kill["how"] == "event"
        ]
        number = numbers[int(kill["at"] * len(numbers))]
        plan = {**{k: kill[k] for k in ("rank", "victim", "cut")}, "event": number}
    processes = runs.RUNS[run][0]
    started = runs.Run(runs.words(run), home, processes, plan)
    struck: tuple[str, bool] | None = None
    if plan is None:
        if started.wait(kill["at"] * seconds) is None:
            started.kill(kill["victim"], kill["rank"])
            struck = ("time", False)
        else:
            return None, started.process.exitcode
    status = started.wait(60)
    started.gone(20.0)
    if (home / "killed").is_file():
        label, saving = json.loads((home / "killed").read_text())
        return (label, saving), status
    if struck is not None:
        return ("time", runs.in_save(home / "out")), status
    return None, status


def _strike_command(
    run: str, home: Path, kill: dict[str, Any], events: Any, seconds: float
) -> tuple[tuple[str, bool] | None, int | None]:
    """The same with the real command: the kill waits for a save's temporary folder to appear, or
    for a moment.
    """
    started = runs.command(runs.words(run), home)
    moment = time.monotonic() + 12 + kill["at"] * seconds
    while started.poll() is None:
        if kill["how"] == "time" and time.monotonic() > moment:
            break
        if kill["how"] != "time" and runs.in_save(home / "out"):
            break
        time.sleep(0.001)
    if started.poll() is not None:
        return None, started.returncode
    members = runs.session(started.pid)
    others = sorted(members - {started.pid}) or [started.pid]
    victim = {
        "launcher": [started.pid],
        "tree": sorted(members),
        "rank": [others[-1 - kill["rank"] % len(others)]],
    }[kill["victim"]]
    for pid in victim:
        try:
            runs.os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    started.wait(90)
    _wait_for_end(started.pid)
    return ("command", runs.in_save(home / "out")), started.returncode


def _wait_for_end(leader: int) -> None:
    end = time.monotonic() + 30
    while runs.session(leader) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in runs.session(leader):
        runs.os.kill(pid, signal.SIGKILL)


def _to_its_end(run: str, home: Path, real: bool) -> int | None:
    if not real:
        return runs.run_whole(run, home)
    started = runs.command(runs.words(run), home)
    try:
        return started.wait(180)
    finally:
        _wait_for_end(started.pid)


def _tail(home: Path) -> str:
    return " ".join((home / "log").read_text(errors="replace").split())[-500:]
