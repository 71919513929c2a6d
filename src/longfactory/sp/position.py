"""Where in a rank's tokens a chunk begins that a module is being run on, for what watches modules
from inside (routers).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_position: contextvars.ContextVar[int | None] = contextvars.ContextVar("position", default=0)
_trial: contextvars.ContextVar[bool] = contextvars.ContextVar("trial", default=False)


def position() -> int | None:
    """Which token of a module's input the chunk begins with that is being computed, on this thread;
    None while a few tokens are tried. For hooks inside the module.
    """
    return None if _trial.get() else _position.get()


def start_of_chunk() -> int:
    """As `position`, of tokens that are tried too: of these, not of the row."""
    return _position.get() or 0


@contextlib.contextmanager
def at(start: int | None) -> Iterator[None]:
    """Inside the block a module's input begins at token `start`."""
    token = _position.set(start)
    try:
        yield
    finally:
        _position.reset(token)


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Inside the block a few tokens are tried, in chunks perhaps, which are none of a row: nothing
    is to be counted.
    """
    token = _trial.set(True)
    try:
        yield
    finally:
        _trial.reset(token)
