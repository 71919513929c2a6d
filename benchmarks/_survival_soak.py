"""Hours of training with two processes: memory and handles stay flat, the log is complete.

A packed run with evaluations and checkpoints goes on until its time is up and is then asked to stop
(SIGTERM). While it goes, the resident memory, the open handles and the threads of its processes are
sampled. `SURVIVAL_SOAK_MINUTES` is how long, 120 by default.

What is specified: the first quarter is warm-up; after it no rank's resident memory grows by more
than 1 % (the median of the last quarter of the time against that of the second), and it has no more
handles and threads than before: the fewest of each quarter are compared, since a sample may see a
file that is open for a moment. The log has a row for every `LOGGED` steps, with finite losses;
`save_total_limit` checkpoints are left, and the stop saves the last step.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from _survival_processes import (
    STARTED,
    Command,
    checkpoints,
    descendants,
    keys,
    make_home,
    problems,
    result,
    send,
    start,
)

LOGGED, SAVED, KEPT = 20, 400, 2
EVERY = 10.0
"""Seconds between two samples."""
GRACE = 60
RUN: dict[str, Any] = {
    "sequence_parallel_size": 2,
    "packing": True,
    "val_size": 4,
    "eval_strategy": "steps",
    "eval_steps": SAVED,
    "save_steps": SAVED,
    "save_total_limit": KEPT,
    "logging_steps": LOGGED,
    "max_steps": 10**7,
    "learning_rate": "1e-5",
    "signal_grace": GRACE,
    "loss_path": None,
}


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    minutes = float(os.environ.get("SURVIVAL_SOAK_MINUTES", "120"))
    for number in range(count):
        yield {"seed": seed, "number": number, "minutes": minutes}


def sample(pid: int) -> dict[str, int] | None:
    """Resident memory in KiB, open handles and threads of a process; None where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        handles = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in fields:
        return None
    return {
        "rss": int(fields["VmRSS"].split()[0]),
        "handles": handles,
        "threads": int(fields["Threads"]),
    }


def watch(command: Command, seconds: float) -> dict[str, list[dict[str, int]]]:
    """Samples of the launcher and the ranks until the time is up or the command has ended."""
    pids = {"launcher": command.process.pid}
    pids |= {f"rank {rank}": pid for rank, pid in sorted(command.workers().items())}
    found: dict[str, list[dict[str, int]]] = {name: [] for name in pids}
    end = time.monotonic() + seconds
    while time.monotonic() < end and command.process.poll() is None:
        for name, pid in pids.items():
            if (now := sample(pid)) is not None:
                found[name].append(now)
        time.sleep(min(EVERY, seconds / 100))
    return found


def growth(samples: list[dict[str, int]]) -> dict[str, float]:
    """Resident memory of the last quarter over that of the second, and the fewest handles and
    threads of the last quarter beyond the fewest of the second; `most`: the same of the most.
    """
    quarter = len(samples) // 4
    before, after = samples[quarter : 2 * quarter], samples[3 * quarter :]

    def median(part: list[dict[str, int]]) -> float:
        return statistics.median(s["rss"] for s in part)

    def more(name: str, of: Callable[[Iterable[int]], int]) -> int:
        return of(s[name] for s in after) - of(s[name] for s in before)

    return {
        "rss_mib": round(median(after) / 1024, 1),
        "rss": round(median(after) / median(before) - 1, 5),
        "handles": more("handles", min),
        "threads": more("threads", min),
        "most_handles": more("handles", max),
    }


def wrong_rows(out: Path) -> list[str]:
    """What is wrong with the log of a run that was stopped."""
    rows = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    trained = [r for r in rows if "loss" in r]
    steps = [r["current_steps"] for r in trained]
    found = []
    expected = list(range(LOGGED, LOGGED * (len(steps) + 1), LOGGED))
    if steps != expected:
        first = next((s for s, e in zip(steps, expected, strict=True) if s != e), None)
        found.append(f"the log leaves out steps before {first}")
    if not all(math.isfinite(r["loss"]) for r in trained):
        found.append("a loss that is not finite")
    evaluated = [r for r in rows if "eval_loss" in r]
    if len(evaluated) != steps[-1] // SAVED:
        found.append(f"{len(evaluated)} evaluations in {steps[-1]} steps")
    return found


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    make_home(home)
    out, begun = home / "out", time.monotonic()
    seconds = 60.0 * case["minutes"]
    limit = seconds + 3 * STARTED + GRACE
    command = start(home, keys(home, out, **RUN))
    if not command.until(lambda: command.steps() >= 2, 3 * STARTED):
        command.kill()
        return result(False, begun, limit, "no step was reached", command)
    samples = watch(command, seconds)
    pids = [command.process.pid, *descendants(command.process.pid)]
    send(command.process.pid, signal.SIGTERM)
    status = command.wait(GRACE + 30)
    wrong = problems(command, pids)
    if status != 75:
        wrong.append(f"exit status {status}")
        return result(False, begun, limit, "; ".join(wrong), command)
    grown = {name: growth(found) for name, found in samples.items()}
    for name, by in grown.items():
        if by["rss"] > 0.01:
            wrong.append(f"{name}: resident memory grew by {by['rss']:.2%}")
        wrong += [
            f"{name}: {by[kind]} more {kind}" for kind in ("handles", "threads") if by[kind] > 0
        ]
    wrong += wrong_rows(out)
    kept = checkpoints(out)
    if not kept or len(kept) > KEPT:
        wrong.append(f"checkpoints: {kept}")
    words = ", ".join(
        f"{name} {by['rss_mib']:.0f} MiB ({by['rss']:+.2%})" for name, by in grown.items()
    )
    said = f"{max(kept, default=0)} steps; {words}; " + ("; ".join(wrong) or "flat, log complete")
    return result(not wrong, begun, limit, said, command, grown=grown, steps=max(kept, default=0))
