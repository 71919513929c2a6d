"""Errors that a user can act on. The command line prints their message alone, on rank 0 alone, and
exits with a non-zero status.
"""

from __future__ import annotations


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
