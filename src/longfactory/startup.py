"""Where the time from a command's start to the end of a run's first step goes, in this process.

The parts follow each other: `done` says what the time since the last call was spent on. What
compilers took inside of a part is counted beside it. After `end` nothing is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from longfactory.processes import begin_of_process

BEGAN = "LONGFACTORY_BEGAN"
"""Environment variable of the workers: when the launcher began this attempt (`time.time()`)."""
COMPILING, SCHEDULES = "compiling", "measuring schedules"
"""What is counted inside of parts."""


@dataclasses.dataclass
class Part:
    """One stretch, in seconds."""

    seconds: float = 0.0
    inside: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of them: what was spent on what is counted by itself."""


@dataclasses.dataclass
class Startup:
    """The parts of one start, in the order in which they ended.

    Args:
        began: when the command began, as `time.time()`.
    """

    began: float
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    functions: int = 0
    """How often torch compiled a function (one form of its arguments)."""
    kernels: int = 0
    """Triton kernels that were compiled in this process, other than torch's."""
    stored: int = 0
    """Those that Triton found in its cache."""
    marked: float = 0.0
    """Until when time is given to parts."""
    inside: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the part that is not done."""
    leave: Callable[[], None] = lambda: None
    """Ends the watch over compilers."""

    def __post_init__(self) -> None:
        self.marked = self.began

    def done(self, part: str, now: float) -> None:
        """The time up to now belongs to `part`; of one that comes twice it is added up."""
        entry = self.parts.setdefault(part, Part())
        entry.seconds += max(now - self.marked, 0.0)
        for what, seconds in self.inside.items():
            entry.inside[what] = entry.inside.get(what, 0.0) + seconds
        self.marked, self.inside = max(now, self.marked), {}

    def spent(self, what: str, seconds: float) -> None:
        """So much of the part that is not done was spent on `what`."""
        self.inside[what] = self.inside.get(what, 0.0) + seconds

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(part.seconds for part in self.parts.values())

    def row(self) -> dict[str, float]:
        """Seconds of each part, and of what was counted inside of all of them."""
        found = {name: round(part.seconds, 2) for name, part in self.parts.items()}
        for what in (COMPILING, SCHEDULES):
            total = sum(part.inside.get(what, 0.0) for part in self.parts.values())
            if total >= 0.01:
                found[f"of these {what}"] = round(total, 2)
        return found

    def line(self) -> str:
        """In words. Parts that round to nothing are left out."""
        told = [
            f"{name} {part.seconds:.1f}{_of_these(part)}"
            for name, part in self.parts.items()
            if part.seconds >= 0.05
        ]
        counts = [
            f"{count} {what}"
            for count, what in (
                (self.functions, "functions by torch"),
                (self.kernels, "Triton kernels"),
                (self.stored, "more Triton kernels from their cache"),
            )
            if count
        ]
        compiled = f" Compiled: {', '.join(counts)}." if counts else ""
        return (
            f"From the command to the end of the first step: {self.seconds:.1f} s:"
            f" {', '.join(told)}.{compiled}"
        )


def _of_these(part: Part) -> str:
    words = [f"{s:.1f} {what}" for what, s in part.inside.items() if s >= 0.05]
    return f" (of these {', '.join(words)})" if words else ""


_now: Startup | None = None


def begin(launcher: bool = False) -> None:
    """A command begins: with its launcher, with this process, or, where this process has begun
    something before, now.

    Args:
        launcher: a launcher of this program may have started this process.
    """
    global _now
    own = time.time() if _now is not None else begin_of_process()
    given = os.environ.get(BEGAN) if launcher else None
    _now = Startup(float(given) if given else own)
    if given:
        _now.done("launcher", own)


def begun() -> Startup | None:
    """What is being counted, None before `begin` and after `end`."""
    return _now


def done(part: str) -> None:
    """The time since the last call of this was spent on `part`."""
    if _now is not None:
        _now.done(part, time.time())


@contextlib.contextmanager
def within(what: str) -> Iterator[None]:
    """The block's time, without what compilers take, is counted inside of its part, as `what`."""
    counting, start = _now, time.monotonic()
    compiling = 0.0 if counting is None else counting.inside.get(COMPILING, 0.0)
    try:
        yield
    finally:
        if counting is not None:
            compiled = counting.inside.get(COMPILING, 0.0) - compiling
            counting.spent(what, time.monotonic() - start - compiled)


def end(part: str) -> Startup | None:
    """The last part is done; what was counted, None where nothing was."""
    global _now
    if (found := _now) is not None:
        found.done(part, time.time())
        found.leave()
    _now = None
    return found


def watch_compilers() -> None:
    """Counts what torch's and Triton's compilers take, up to the end. For processes that have a
    GPU: others compile nothing, and need not wait for the import.
    """
    if _now is None:
        return
    from torch._dynamo.callback import callback_handler

    watch = _Compilers()
    callback_handler.register_start_callback(watch.torch_begins)
    callback_handler.register_end_callback(watch.torch_ends)
    try:
        from triton import knobs
    except ImportError:
        knobs = None
    if knobs is not None:
        watch.listener = knobs.compilation.listener
        knobs.compilation.listener = watch.triton_compiled

    def leave() -> None:
        callback_handler.remove_start_callback(watch.torch_begins)
        callback_handler.remove_end_callback(watch.torch_ends)
        if knobs is not None:
            knobs.compilation.listener = watch.listener

    _now.leave = leave


class _Compilers:
    """Triton's own times of kernels that torch makes are within torch's."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.listener: Callable[..., None] | None = None
        """Triton's listener of before."""

    def torch_begins(self, _: Any) -> None:
        self.since = time.monotonic()

    def torch_ends(self, _: Any) -> None:
        if _now is not None and self.since is not None:
            _now.spent(COMPILING, time.monotonic() - self.since)
            _now.functions += 1
        self.since = None

    def triton_compiled(self, *, times: Any, cache_hit: bool, **others: Any) -> None:
        if self.listener is not None:
            self.listener(times=times, cache_hit=cache_hit, **others)
        if _now is None or self.since is not None:
            return
        _now.spent(COMPILING, times.total / 1e6)
        if cache_hit:
            _now.stored += 1
        else:
            _now.kernels += 1
