"""The step at which all ranks stop.

A signal reaches one process at any moment, and all must stop after the same optimizer step: one
that went on alone would wait in its next collective for ever. No collective is spent on it. The
main thread counts boundaries (the start of training, then the end of each step), which are the same
on every rank. When a stop is asked for, the thread of each rank notes the boundary that its main
thread will reach next, and writes it on the board; from then on the main thread waits at each
boundary until all have written. They stop at the greatest: no rank has passed it, since each noted
its own before passing it. A rank that is behind goes on up to there, and the others with it.

A step that nobody stops at costs one comparison under a lock, and a second of thread time an hour.
"""

from __future__ import annotations

import threading
from typing import Any

from longfactory.train.survival.board import Board

FINISHED = 1 << 60
"""The boundary of a rank that has done its last step: it is never reached, so the run goes on to
its end.
"""


class StopAgreement:
    """One rank's part. `arrive` is for the main thread, `answer` for the watching thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._answered: int | None = None
        self._decided = threading.Event()
        self.boundary: int | None = None
        """Where all stop, once it is known. 0: nobody has begun to train."""

    def arrive(self, following: int) -> bool:
        """The main thread is at a boundary. Waits only where a stop was asked for.

        Args:
            following: the boundary after this one: the next step, or FINISHED.
        Returns:
            Whether this is where all ranks stop.
        """
        with self._lock:
            here = self._next
            if self._answered is None:
                self._next = following
                return False
        self._decided.wait()
        if self.boundary == here:
            return True
        self._next = following
        return False

    def answer(self, board: Board | None) -> None:
        """A stop was asked for: writes this rank's boundary, and reads what was decided where all
        have written. Called again until `boundary` is known.
        """
        if self.boundary is not None:
            return
        with self._lock:
            first = self._answered is None
            if first:
                self._answered = self._next
            answered = self._answered
        assert answered is not None
        if board is None:
            self._decide(answered)
            return
        if first:
            board.put(f"boundary/{board.rank}", answered)
        every: list[Any] | None = board.get_all("boundary")
        if every is not None:
            self._decide(max(every))

    def _decide(self, boundary: int) -> None:
        self.boundary = boundary
        self._decided.set()
