"""Limits for chat templates, which come with a model and are programs.

transformers renders them in jinja2's sandbox: no attribute of Python's own, no change of what is
passed in, no `range` above 100,000. What it lacks is here: time, memory, and powers of whole
numbers, which no signal interrupts.

A template is tried once in a process of its own, which is ended by the system when it takes too
long. After that each rendering has a limit in this process: it costs some 20 microseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from longfactory.errors import DataError

SECONDS, BYTES = 10.0, 2 << 30
"""What one rendering may take: time, and memory beyond what the process holds."""


class TooMuch(Exception):
    """A rendering took more than it may."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Ends a block that takes too long, or too much memory. Time is limited in a process's main
    thread, memory on Linux; elsewhere the block runs without.

    Raises:
        TooMuch: in the block.
    """
    with _memory(more_bytes), _time(seconds):
        try:
            yield
        except MemoryError:
            raise TooMuch(f"it needs more than {more_bytes >> 20} MB") from None
        except RecursionError:
            raise TooMuch("it calls itself without end") from None


@contextlib.contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def late(*_: Any) -> None:
        raise TooMuch(f"it takes longer than {seconds:g} s")

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, late)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # Whoever had set the timer has it back.
        left = max(rest - (time.monotonic() - begun), 1e-3) if rest else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextlib.contextmanager
def _memory(more_bytes: int) -> Iterator[None]:
    held = _data_bytes()
    if held is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [x for x in (held + more_bytes, soft, hard) if x != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int | None:
    """Private memory of this process, as RLIMIT_DATA counts it; None where it is not known."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def ends_apart(function: Callable[[], Any], seconds: float = SECONDS) -> bool:
    """Whether a function ends within its time in a process of its own, which cannot be held up by
    what no signal interrupts. What it returns or raises is not looked at.
    """
    if not hasattr(os, "fork"):
        return True
    child = os.fork()
    if child == 0:
        try:
            with contextlib.suppress(BaseException), _memory(BYTES):
                function()
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    pause = 0.001
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def refuse_powers(template: str) -> None:
    """Refuses a chat template that raises numbers to powers: 9**9**9 ends in hours, and cannot be
    interrupted.

    Raises:
        DataError: with the line.
    """
    import jinja2

    before = ""
    try:
        for line, kind, text in jinja2.Environment().lex(template):
            if kind == "operator" and text == "**" and before not in ("(", ","):
                raise DataError(
                    f"The chat template raises numbers to powers (line {line}), which may take any"
                    " time. Name a template with `template:`."
                )
            if kind not in ("whitespace", "linecomment"):
                before = text
    except jinja2.TemplateSyntaxError:
        return  # told when it is rendered
