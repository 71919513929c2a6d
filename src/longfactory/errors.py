"""Errors that a user can act on. The command line prints their message alone, on rank 0 alone, and
exits with a non-zero status.
"""

from __future__ import annotations

import errno


class UserError(Exception):
    """Something that the person who started the run can put right. The message says what was found,
    what was expected, what to do.
    """


class ConfigError(UserError, ValueError):
    """A key, a value, or a combination of them, that cannot be run."""


class DataError(UserError, ValueError):
    """A data set that cannot be used, told in one sentence or two."""


class Stopped(BaseException):
    """The run ends because a signal asked for it. Not an Exception: what catches failures on the
    way (a tracker, a write that may fail) lets it pass.
    """


# Exit statuses of the command, beside 0 (done), 1 (the program failed) and 128 + N (ended by signal
# N at once). docs/stopping.md has the table.
USER_ERROR = 2
"""The user has been told what to put right."""
STOPPED = 75
"""A signal asked the run to stop, and it did: the same command goes on. (EX_TEMPFAIL)"""
STALLED = 76
"""A process did not move, or gave no sign of life, within its time limit."""
PEER_LOST = 77
"""The run ended on another machine."""


DISK = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENFILE,
    }
)
"""What a system says of a disk, a path or its limits, and not of a program."""


def disk_sentence(error: BaseException) -> str | None:
    """What a disk or a path said, in a sentence; None where an error is another one.

    Libraries in other languages hand on the system's words in errors of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK:
            where = f"{seen.filename}: " if seen.filename is not None else ""
            return f"{where}{seen.strerror or seen}. Free up space, or choose another location."
        if "(os error 28)" in str(seen) or "No space left on device" in str(seen):
            return f"No space left on device ({' '.join(str(seen).split())[:200]}). Make room."
        seen = seen.__cause__
    return None
