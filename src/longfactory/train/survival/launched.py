"""What the launcher and its workers of one machine tell each other: files in a folder that lives as
long as the launcher. Imports no torch, and works before there is any connection.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from longfactory.processes import children_of, state_of

TOLD = "LONGFACTORY_TOLD"
"""Environment variable of the workers: a path that the one who tells the user of an error creates.
The folder that it is in is the one of this module.
"""


def folder() -> Path | None:
    """The folder, None where no launcher of ours has started this process."""
    path = os.environ.get(TOLD)
    return None if path is None else Path(path).parent


def claim_the_word() -> bool:
    """Whether this process is the one that tells the user: the first of a launch that asks, or any
    where there is no launch of ours.
    """
    path = os.environ.get(TOLD)
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as e:
        return not isinstance(e, FileExistsError)
    return True


# ---- workers -------------------------------------------------------------------------------------


def register(rank: int) -> None:
    """Says which process a worker is."""
    if (where := folder()) is not None:
        with contextlib.suppress(OSError):
            (where / f"worker-{rank}").write_text(str(os.getpid()))


def workers(where: Path | None = None) -> dict[int, int]:
    """Process ids by rank of the workers that have said so, in the folder or in this process's."""
    where = where or folder()
    found: dict[int, int] = {}
    if where is None:
        return found
    for path in where.glob("worker-*"):
        text = path.read_text().strip()
        if text.isdigit():
            found[int(path.name.removeprefix("worker-"))] = int(text)
    return found


def a_sibling_is_gone() -> bool:
    """Whether another worker of this machine has ended: then torchrun ends this one too, by the
    same signal that a user may send.
    """
    where = folder()
    if where is None:
        # Of another launcher it is known how many it has started, and how many live.
        started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return started > 1 and len(children_of(os.getppid())) < started
    mine = os.getpid()
    return any(p != mine and state_of(p) in (None, "Z", "X") for p in workers().values())


def wait_for_siblings(seconds: float) -> None:
    """Waits where another worker of this machine has ended or ends within a second."""
    end = time.monotonic() + 1.0
    while not a_sibling_is_gone():
        if folder() is None or time.monotonic() > end:
            return
        time.sleep(0.1)
    time.sleep(seconds)


# ---- a stop, and how it ended --------------------------------------------------------------------


def ask_to_stop(signum: int) -> None:
    """The launcher or a worker got a signal: all of this machine stop, also those that have no
    connection to the others yet.
    """
    where = folder()
    if where is None or (where / "stop").exists():
        return
    beside = where / f"stop-{os.getpid()}"
    with contextlib.suppress(OSError):
        beside.write_text(str(signum))
        beside.rename(where / "stop")


def asked_to_stop() -> int | None:
    """The signal that the launcher or a worker got, None where none did."""
    where = folder()
    if where is None:
        return None
    try:
        return int((where / "stop").read_text())
    except (OSError, ValueError):
        return None


def write_status(status: int) -> bool:
    """Leaves the exit status of the whole run for the launcher. Whether there is one to read it."""
    where = folder()
    if where is None:
        return False
    try:
        (where / "status").write_text(str(status))
    except OSError:
        return False
    return True


def read_status(where: Path) -> int | None:
    """What a worker has left, None where none has."""
    try:
        return int((where / "status").read_text())
    except (OSError, ValueError):
        return None
