"""Disks that are full, read-only or cannot be, under the output folder, the cache and
tokenized_path.

A case runs the command three times, in processes forked from this one: with room (for `output`, so
that there is a checkpoint), with the fault, and with room again. Full and read-only disks are tmpfs
mounts of their own; where mounting is not permitted a limit on the size of files (RLIMIT_FSIZE)
stands for a full disk, and read-only disks are left out by name.

What is specified: the run with the fault ends with status 2 and one sentence, or it fitted and
ended with 0; no traceback, nothing half-written in the cache, and the checkpoint from before is
whole. The next one with room ends with 0.
"""

from __future__ import annotations

import contextlib
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_values import RUN, STAGES, base, run_command, write_inputs

LIMIT = 180.0
PLACES = ("output", "cache", "tokenized_path")
FAULTS = ("full", "full", "full", "read-only", "a file", "/dev/null/x", "/proc/x", "name too long")
ROOM = 64 << 20
"""Bytes of the mounted disk."""


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for number in range(count):
        fault = FAULTS[number // len(PLACES) % len(FAULTS)]
        case: dict[str, Any] = {"place": PLACES[number % len(PLACES)], "fault": fault}
        if fault == "full":
            # From nothing at all to nearly enough for what the run writes.
            case["free"] = draw.choice([0, 100, 5000, 40_000, 200_000, 600_000, 1_500_000])
        yield case | {
            "stage": draw.choice(list(STAGES)),
            "finetuning": draw.choice(["full", "lora"]),
            "number": number,
        }


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    write_inputs(home)
    begun = time.monotonic()
    if case["fault"] in ("full", "read-only"):
        problem = with_a_disk(case, home)
    else:
        problem = without_a_place(case, home)
    return {
        "ok": problem is None or problem.startswith("left out"),
        "seconds": time.monotonic() - begun,
        "limit": LIMIT,
        "end": problem or "as specified",
        "group": f"{case['place']}, {case['fault']}",
    }


def keys(case: dict[str, Any], home: Path, disk: Path) -> tuple[dict[str, Any], Path]:
    """The run's keys, and its cache, with the place of the case on the disk."""
    given = base(home) | RUN | STAGES[case["stage"]]
    given |= {
        "stage": case["stage"],
        "finetuning_type": case["finetuning"],
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
    }
    cache = disk / "cache" if case["place"] == "cache" else home / "cache"
    if case["place"] == "output":
        given["output_dir"] = str(disk / "out")
    if case["place"] == "tokenized_path":
        given["tokenized_path"] = str(disk / "tokenized")
    return given, cache


def with_a_disk(case: dict[str, Any], home: Path) -> str | None:
    disk = home / "disk"
    disk.mkdir()
    mounted = mount(disk)
    try:
        given, cache = keys(case, home, disk)
        if case["place"] == "output":
            problem = start(given, home, cache)[0]
            if problem:
                return f"with room: {problem}"
            given["max_steps"] = 4
        before = last_step(given)
        with fault(case, disk, mounted) as possible:
            if not possible:
                return "left out: mounting is not permitted here"
            problem, status = start(given, home, cache)
            if problem or status not in (0, 2):
                return f"with the fault: status {status}: {problem}"
        if case["place"] == "cache" and (left := list(disk.glob("cache/**/.*.*.*"))):
            return f"left in the cache: {[p.name for p in left]}"
        if last_step(given) < before:
            return f"the last good checkpoint is of step {last_step(given)}, was {before}"
        problem, status = start(given, home, cache)
        return f"with room again: status {status}: {problem}" if problem or status else None
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=False)


def last_step(given: dict[str, Any]) -> int:
    """The step of the last whole checkpoint of the output folder, 0 without one."""
    from longfactory.config import last_checkpoint

    out = Path(given["output_dir"])
    last = last_checkpoint(out) if out.is_dir() else None
    return 0 if last is None else int(last.name.rpartition("-")[2])


def mount(disk: Path) -> bool:
    """Mounts a tmpfs; whether that is permitted."""
    size = f"size={ROOM}"
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "survival", str(disk)], capture_output=True
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@contextlib.contextmanager
def fault(case: dict[str, Any], disk: Path, mounted: bool) -> Iterator[bool]:
    """Around the run that meets the fault; whether it can be made."""
    if case["fault"] == "read-only":
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield mounted
        if mounted:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    elif mounted:
        ballast = disk / "ballast"
        fill(ballast, case["free"])
        yield True
        ballast.unlink()
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["free"], limits[1]))
        yield True
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill(ballast: Path, free: int) -> None:
    """A file that leaves so many bytes of its disk."""
    block = bytes(4096)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as f:
        while f.write(block):
            pass
    size = ballast.stat().st_size
    with ballast.open("r+b") as f:
        f.truncate(max(size - free, 0))


def without_a_place(case: dict[str, Any], home: Path) -> str | None:
    """A path where nothing can be."""
    if case["fault"] == "a file":
        (home / "file").write_text("x")
        disk = home / "file"
    elif case["fault"] == "name too long":
        disk = home / ("x" * 300)
    else:
        disk = Path(case["fault"])
    given, cache = keys(case, home, disk)
    problem, status = start(given, home, cache)
    if problem or status != 2:
        return f"status {status}: {problem}"
    given, cache = keys(case, home, home / "good")
    problem, status = start(given, home, cache)
    return f"at another place: status {status}: {problem}" if problem or status else None


def start(given: dict[str, Any], home: Path, cache: Path) -> tuple[str | None, int]:
    """One run of the command. Returns what is wrong with how it ended, or None, and its status."""
    status, _, output = run_command(given, home, 60.0, cache=cache)
    told = [line for line in output.splitlines() if "longfactory: " in line]
    if "Traceback (most recent call last)" in output:
        return f"a traceback: {output[-400:]}", status
    if status == -9:
        return "it took longer than 60 s", status
    if status and len(told) != 1:
        return f"{len(told)} sentences: {output[-300:]}", status
    return None, status
