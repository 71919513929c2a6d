"""Processes of this machine: whether one lives, and that one ends with its parent."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def state_of(pid: int) -> str | None:
    """A process's state as in /proc (R, S, T stopped, Z ended, ...), None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


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
