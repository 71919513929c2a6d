"""Questions that a process of its own answers: it may take long, crash, or be given up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_OUTPUT = 1 << 21
"""Bytes of an answer."""
AT_ONCE = 3
"""Questions that are being answered; others wait for their turn."""
TOLD = 4000
"""Characters of an error that the page shows."""


@dataclass(frozen=True)
class Answer:
    """What a process has said. `status` is None where it was ended by the time limit."""

    status: int | None
    output: str
    error: str

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        return {"status": self.status, "output": self.output, "error": self.error[-TOLD:]}


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The server's variables for a process that it starts, without those by which a launcher's
    worker is known.
    """
    workers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LONGFACTORY_WEBUI_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in workers}
    return kept | {"NO_COLOR": "1", "PYTHONUNBUFFERED": "1"} | dict(changes or {})


def command(*words: str) -> list[str]:
    """`longfactory WORDS` as a list of arguments; no shell reads them."""
    return [sys.executable, "-m", "longfactory.cli", *words]


async def ask(
    arguments: Sequence[str],
    seconds: float,
    given_up: Callable[[], Awaitable[bool]],
    turn: asyncio.Semaphore,
    changes: Mapping[str, str] | None = None,
) -> Answer | None:
    """Runs a command and returns what it said; None where nobody waits for it any more.

    Args:
        arguments: of the process, which gets a session of its own and no input.
        seconds: after which it is ended, with all that it has started.
        given_up: whether the page has asked something else meanwhile.
        turn: of `AT_ONCE` questions.
        changes: environment variables.
    """
    async with turn:
        if await given_up():
            return None
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(changes),
            start_new_session=True,
        )
        readers = [asyncio.create_task(_read(s)) for s in (process.stdout, process.stderr)]
        wait = asyncio.create_task(process.wait())
        end = asyncio.get_running_loop().time() + seconds
        status: int | None = None
        try:
            while True:
                done, _ = await asyncio.wait([wait], timeout=0.25)
                if done:
                    status = wait.result()
                    break
                if await given_up():
                    return None
                if asyncio.get_running_loop().time() > end:
                    break
        finally:
            end_group(process.pid)
            await wait
        output, error = await asyncio.gather(*readers)
        if status is None:
            error = f"Ended after {seconds:.0f} seconds without an answer.\n{error}".rstrip()
        return Answer(status, output, error)


def end_group(pid: int) -> None:
    """Ends a process that leads its session, and what it has started in it. A group that has ended
    is no error.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _read(stream: Any) -> str:
    """All that a process writes, of which the first `MOST_OUTPUT` bytes are kept."""
    kept, size = [], 0
    while block := await stream.read(1 << 16):
        if size < MOST_OUTPUT:
            kept.append(block[: MOST_OUTPUT - size])
        size += len(block)
    text = b"".join(kept).decode("utf-8", errors="replace")
    return text if size <= MOST_OUTPUT else f"{text}\n... {size - MOST_OUTPUT} bytes more"
