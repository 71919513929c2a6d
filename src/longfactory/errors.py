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
