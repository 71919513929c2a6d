"""Processes of this machine: whether one lives, and that one ends with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path


def state_of(pid: int) -> str | None:
    """A process's state as in /proc (R, S, T stopped, Z ended, ...), None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


_IMPORTED = time.time()


def begin_of_process() -> float:
    """When this process began, as `time.time()`; where the system does not tell, when this module
    was imported.
    """
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return _IMPORTED
    return time.time() - age


def children_of(pid: int) -> list[int]:
    """Processes that a process of this machine has started and that have not ended."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return [child for child in found if state_of(child) not in (None, "Z", "X")]


def die_with_parent() -> None:
    """Ends this process, by SIGKILL, when the one that started it ends. Without it a killed
    launcher would leave workers that hold their devices, and those would leave theirs.
    """
    if sys.platform != "linux":
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended meanwhile
