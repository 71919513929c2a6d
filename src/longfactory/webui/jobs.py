"""Runs that the page has started: each is the command in a session of its own, which goes on
without the page and without the server. What is known of it lies in a folder; every viewer reads
the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from longfactory.config.folder import write_whole
from longfactory.errors import STOPPED, UserError
from longfactory.processes import state_of
from longfactory.webui.ask import command as command_line
from longfactory.webui.ask import end_group, environment
from longfactory.webui.compose import redacted

HOME = "longfactory_webui"
"""In the first chosen folder: what the page writes of its own."""
TAIL = 64 << 10
"""Bytes at the end of a console that are shown."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and movements of a terminal's cursor."""
NAME = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")

State = Literal["running", "stopping", "done", "stopped", "failed", "unknown"]


@dataclasses.dataclass
class Job:
    """One process that the page has started, as it is kept in job.json."""

    name: str
    command: str
    output_dir: str
    pid: int
    began: int
    """When the process began, in the kernel's ticks: a later process may have its number."""
    started: float
    """Seconds since 1970."""
    ended: float | None = None
    status: int | None = None
    """Exit status; None while it runs, or where nobody was there to see it."""
    asked: float | None = None
    """When it was asked to stop."""

    @property
    def state(self) -> State:
        if self.ended is None:
            return "running" if self.asked is None else "stopping"
        if self.status is None:
            return "unknown"
        if self.status == 0:
            return "done"
        return "stopped" if self.status == STOPPED else "failed"

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        return {**dataclasses.asdict(self), "state": self.state}


class Jobs:
    """The jobs below a folder.

    Args:
        root: the first chosen folder.
    """

    def __init__(self, root: Path):
        self.home = root / HOME
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(
        self,
        command: str,
        yaml: str,
        output_dir: str,
        more: Sequence[str] = (),
        *,
        file: bool = True,
    ) -> Job:
        """Starts `longfactory COMMAND` on a run that has been checked.

        Args:
            command: its word.
            yaml: the run.
            output_dir: where it writes.
            more: further words.
            file: the command reads the run's file; else `more` says all.
        Raises:
            UserError: its folder cannot be written.
        """
        name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
        folder = self.home / name
        try:
            folder.mkdir(parents=True)
            run = folder / "run.yaml"
            run.touch(mode=0o600)  # it may hold a token
            run.write_text(yaml, encoding="utf-8")
            words = [command, *([str(run)] if file else []), *more]
            if command == "verify":
                words += ["--json", str(folder / "verify.json")]
            if command == "eval":
                words.append(f"report_dir={folder}")
            # before the process: it may have written its first lines when Popen returns; files'
            # times are those of the kernel's last tick
            started = time.time() - 0.05
            with (folder / "console.log").open("wb") as console:
                process = subprocess.Popen(
                    command_line(*words),
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
        began = began_at(process.pid) or 0
        job = Job(name, command, output_dir, process.pid, began, started)
        with self._lock:
            self._processes[name] = process
            self._write(job)
        return job

    def all(self) -> list[Job]:
        """Every job, the last one first."""
        try:
            names = sorted((p.name for p in self.home.iterdir()), reverse=True)
        except OSError:
            return []
        return [job for name in names if (job := self.get(name)) is not None]

    def get(self, name: str) -> Job | None:
        """A job by its name, with what has become of it; None where there is none, or it cannot be
        read.
        """
        if not NAME.fullmatch(name):
            return None
        with self._lock:
            try:
                job = Job(**json.loads((self.home / name / "job.json").read_text("utf-8")))
            except (OSError, ValueError, TypeError):
                return None
            if job.ended is None and not self._lives(job):
                process = self._processes.pop(name, None)
                job.status = process.poll() if process is not None else None
                job.ended = time.time()
                self._write(job)
            return job

    def _lives(self, job: Job) -> bool:
        process = self._processes.get(job.name)
        if process is not None:
            return process.poll() is None
        # Of an earlier server: it is the same process where it began at the same moment.
        return state_of(job.pid) not in (None, "Z", "X") and began_at(job.pid) == job.began

    def _write(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # a full disk ends no run
            write_whole(self.home / job.name / "job.json", json.dumps(dataclasses.asdict(job)))

    def stop(self, name: str, kill: bool = False) -> Job:
        """Asks a job to save and end (SIGTERM), or ends it with all its processes (SIGKILL).

        Raises:
            UserError: there is no such job.
        """
        job = self.get(name)
        if job is None:
            raise UserError(f"There is no run {name}.")
        if job.ended is not None:
            return job
        if kill:
            end_group(job.pid)
        elif job.asked is None:  # a second signal would end it without a save
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)
        if job.asked is None:
            job.asked = time.time()
            with self._lock:
                self._write(job)
        return job

    def console(self, name: str) -> str:
        """The last lines that a job has printed, as a terminal would show them."""
        try:
            with (self.home / name / "console.log").open("rb") as file:
                file.seek(0, os.SEEK_END)
                size = file.tell()
                file.seek(max(0, size - TAIL))
                block = file.read()
        except OSError as error:
            return f"The console's file cannot be read: {error.strerror or error}."
        if size > TAIL:
            block = block[block.find(b"\n") + 1 :]
        return terminal_text(block.decode("utf-8", errors="replace"))

    def yaml(self, name: str) -> str:
        """The run as it was written, without its secrets."""
        try:
            return redacted((self.home / name / "run.yaml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return ""

    def picture(self, name: str) -> Path:
        """Where `eval` draws what a model finds."""
        return self.home / name / "long_context.png"

    def report(self, name: str) -> Path:
        """Where `verify` writes its report."""
        return self.home / name / "verify.json"


def began_at(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since the machine's start; None where there is
    none.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def terminal_text(text: str) -> str:
    """What a terminal would show: of a line that was written over (progress bars) what was written
    last, and no colours.
    """
    lines = []
    for line in ESCAPES.sub("", text).split("\n"):
        parts = [part for part in line.split("\r") if part.strip()]
        lines.append(parts[-1].rstrip() if parts else "")
    return "\n".join(lines)
