"""Signals that ask for a stop, told from those that mean something else. Imports no torch.

The handler does nothing: Python writes the signal's number into a pipe (`set_wakeup_fd`) even while
the main thread is inside a collective or a kernel launch, and a thread reads it there.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

from longfactory.errors import Stopped
from longfactory.processes import die_with_parent

DEFAULT = ("SIGTERM", "SIGINT", "SIGUSR1")
TOGETHER = 1.0
"""Seconds in which signals count as one: a scheduler may signal every process of a job, and a
script of it pass the signal on.
"""


class StopSignals:
    """The stop signals of this process. Made in the main thread; `wait` is for one other thread.

    Args:
        names: of signals, such as SIGTERM.
    """

    def __init__(self, names: Iterable[str] = DEFAULT):
        self._old: dict[int, Any] = {}
        self._unwind = False
        self._own = False
        self.first: int | None = None
        """The number of the first signal, once there was one."""
        self._first_at = 0.0
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.install(names)
        _reset_in_children()

    def install(self, names: Iterable[str]) -> None:
        """Listens to these signals, and no longer to others. In the main thread."""
        wanted = {int(getattr(signal, name)) for name in names}
        for number in set(self._old) - wanted:
            signal.signal(number, self._old.pop(number))
        for number in wanted - set(self._old):
            self._old[number] = signal.signal(number, self._handle)

    def renew(self) -> None:
        """Installs the handlers again, in the main thread. LLVM, which Triton compiles with, puts
        its own in their place in the process: it passes SIGTERM and SIGINT on to whoever had them,
        and swallows SIGUSR1 (llvm/lib/Support/Unix/Signals.inc).
        """
        for number in self._old:
            signal.signal(number, self._handle)

    def close(self, ending: bool = False) -> None:
        """Gives the signals back to whoever had them. In the main thread.

        Args:
            ending: the process is about to end by request: signals that come now change nothing.
        """
        if ending or self.first is not None:
            self._old = dict.fromkeys(self._old, signal.SIG_IGN)
        self.install(())
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def wake(self) -> None:
        """Ends the `wait` of the other thread."""
        os.write(self._write, b"\0")

    def wait(self, seconds: float) -> bool:
        """Waits for signals.

        Returns:
            Whether one came after the first: the user does not want to wait.
        """
        try:
            ready, _, _ = select.select([self._read], [], [], seconds)
            numbers = os.read(self._read, 256) if ready else b""
        except OSError:  # closed meanwhile
            time.sleep(seconds)
            return False
        again = False
        for number in numbers:
            if number not in self._old or self._own:
                continue
            if self.first is None:
                self.first, self._first_at = number, time.monotonic()
            elif time.monotonic() - self._first_at > TOGETHER:
                again = True
        return again

    def unwind(self) -> None:
        """Makes the main thread raise `Stopped` where it is, as Ctrl-C makes it raise
        KeyboardInterrupt: what it has opened is closed on the way out. From another thread.
        """
        self._unwind = self._own = True
        number = next(iter(self._old), None)
        if number is not None:
            # a real signal: it also ends a system call that the main thread waits in
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._unwind:
            self._unwind = False
            raise Stopped


_registered = False


def _reset_in_children() -> None:
    """Processes that this one forks (tokenising, loading) keep none of its handlers: a child that
    caught SIGTERM could not be ended. Ctrl-C in a terminal reaches them too, and is not theirs.
    """
    global _registered
    if _registered:
        return
    _registered = True

    def reset() -> None:
        signal.set_wakeup_fd(-1)
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
            if callable(signal.getsignal(getattr(signal, name))):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    os.register_at_fork(after_in_child=reset)


def ignore_in_loader(worker: int) -> None:
    """For a process of a DataLoader, which lives as long as its rank: a scheduler that signals
    every process of a job must not take it away while the rank saves.
    """
    die_with_parent()
    for name in (*DEFAULT, "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def name_of(number: int | None) -> str:
    """SIGTERM for 15."""
    return "a signal" if number is None else signal.Signals(number).name
