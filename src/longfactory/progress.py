"""What this process is doing, for those who watch over it: a phase, a step, and when it last moved.

Whoever works says so in a call that costs less than a microsecond; whoever watches (a thread, see
`train/survival/`) reads. Nothing here waits, writes or communicates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Literal

Phase = Literal["start-up", "step", "save", "evaluation"]
"""What a time limit is for. What comes after the last step is `save`, where it writes, else
`evaluation`.
"""


@dataclasses.dataclass
class Progress:
    """One process. `since` is `time.monotonic()` of its last movement, `moves` how many it made."""

    phase: Phase = "start-up"
    detail: str = "starting"
    """In words, for a message: what it does within the phase."""
    step: int = 0
    """The optimizer step that is in progress; 0 before the first."""
    moves: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)

    def age(self) -> float:
        """Seconds since the last movement."""
        return time.monotonic() - self.since


NOW = Progress()
"""Of this process."""


def moved(detail: str | None = None) -> None:
    """The work went on: the time limit of the phase begins anew."""
    NOW.moves += 1
    NOW.since = time.monotonic()
    if detail is not None:
        NOW.detail = detail


def enter(phase: Phase, detail: str = "", step: int | None = None) -> None:
    """Another phase begins."""
    NOW.phase = phase
    if step is not None:
        NOW.step = step
    moved(detail)


@contextlib.contextmanager
def within(phase: Phase, detail: str = "") -> Iterator[None]:
    """A phase for as long as the block runs; then the one before goes on. In start-up, whose limit
    is for all that happens before the first step is done, the phase stays.
    """
    before, words = NOW.phase, NOW.detail
    enter("start-up" if before == "start-up" else phase, detail)
    try:
        yield
    finally:
        enter(before, words)
