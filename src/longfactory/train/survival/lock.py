"""One run in an output folder at a time. Imports no torch.

The lock is the kernel's (flock) on a file in the folder: it falls when its holder dies, however. On
NFS (since Linux 2.6.12) flock is a lock of the server and counts for all machines; on Lustre it
does where it is mounted with `flock`. Where a file system refuses, the run goes on unlocked and
says so. The launcher holds it, so that it lasts through restarts; without one, the first rank does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from longfactory.errors import UserError

FILE = "_longfactory.lock"
"""Uploads to the hub leave out what begins with an underscore."""
HOLDER = "LONGFACTORY_LOCK_HOLDER"
"""Environment variable: the process id of the launcher that holds the lock for its workers."""


class FolderLock:
    """The lock of an output folder, held from here on.

    Args:
        folder: made where it is not there.
    Raises:
        UserError: another run holds it.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._made = folder if made else None
        self.note: str | None = None
        """A sentence where the file system has no locks."""
        self._file: IO[str] | None = self._take(folder)

    def _take(self, folder: Path) -> IO[str]:
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  held until close
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = _holder(file.read())
                file.close()
                raise UserError(
                    f"output_dir: {folder} is in use by another run ({holder}). Wait for its end,"
                    " or choose another folder."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                self.note = (
                    f"output_dir: the file system of {folder} does not support locks "
                    f"({error.strerror}): a second run in the same folder would not be noticed."
                )
            # Whoever held it last may have removed the file between our open and our lock.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                break
            file.close()
        file.truncate(0)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        file.write(json.dumps(about))
        file.flush()
        return file

    def release(self) -> None:
        """Gives the folder back; one that this lock has made and that is empty is removed."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._file.close()
        self._file = None
        if self._made is not None:
            with contextlib.suppress(OSError):  # it is not empty: the run wrote to it
                self._made.rmdir()


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["since"]))
        return f"process {about['pid']} on {about['host']}, since {since}"
    except (ValueError, KeyError, TypeError):
        return "its process is not known"


def held_by_launcher() -> bool:
    """Whether the launcher that started this process holds the lock."""
    return os.environ.get(HOLDER) == str(os.getppid())
