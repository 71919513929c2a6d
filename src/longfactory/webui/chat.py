"""The conversation with a model: one at a time, the same for all viewers. The model is in a process
of its own, which ends with the server.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from longfactory.errors import UserError
from longfactory.webui.ask import end_group, environment

MOST_ERRORS = 4000
"""Characters of what a process that has ended said last."""


def talk_command(run: Path) -> list[str]:
    """The process that answers, as a list of arguments."""
    return [sys.executable, "-m", "longfactory.webui.talk", str(run)]


class Chat:
    """A process that answers, and what has been said. All methods may be called by any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._errors: list[str] = []
        self.state = "none"
        """none, loading, ready, answering, ended"""
        self.model = ""
        self.error = ""
        self.messages: list[dict[str, str]] = []
        self.version = 0

    def start(self, run: Path, model: str) -> None:
        """Loads a model in place of the one before.

        Args:
            run: the file of its keys, which the caller has checked.
            model: what the page calls it.
        """
        with self._starting:  # two viewers at once
            self._start(run, model)

    def _start(self, run: Path, model: str) -> None:
        self.close()
        process = subprocess.Popen(
            talk_command(run),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment(),
            start_new_session=True,
        )
        with self._lock:
            self._process, self._errors = process, []
            self.state, self.model, self.error, self.messages = "loading", model, "", []
            self.version += 1
        for target in (self._listen, self._hear_errors):
            threading.Thread(target=target, args=(process,), daemon=True).start()

    def ask(self, text: str) -> None:
        """Sends a message; the answer comes into `messages`.

        Raises:
            UserError: no model is there, or it is answering.
        """
        with self._lock:
            if self._process is None or self.state != "ready":
                raise UserError(f"The model cannot be asked now: {self.state}.")
            self.messages += [
                {"role": "user", "text": text},
                {"role": "assistant", "text": ""},
            ]
            self.state, self.error = "answering", ""
            self.version += 1
            self._send({"text": text})

    def clear(self) -> None:
        """Forgets the conversation, between two answers."""
        with self._lock:
            if self._process is not None and self.state == "ready":
                self.messages, self.error = [], ""
                self.version += 1
                self._send({"clear": True})

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                self.state = "none"
                self.version += 1
        if process is not None:
            end_group(process.pid)
            process.wait()

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        with self._lock:
            return {
                "state": self.state,
                "model": self.model,
                "error": self.error,
                "messages": [dict(message) for message in self.messages],
                "version": self.version,
            }

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended: the listening thread tells
            pass

    def _hear_errors(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._lock:
                self._errors = [*self._errors[-50:], line]

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Takes what the process says, until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # what a library prints
            if not isinstance(said, dict):
                continue
            with self._lock:
                if process is not self._process:
                    return
                self._hear(said)
        status = process.wait()
        with self._lock:
            if process is not self._process:
                return
            self._process = None
            self.state = "ended"
            last = "".join(self._errors)[-MOST_ERRORS:]
            self.error = self.error or f"The process ended with status {status}.\n{last}".strip()
            self.version += 1

    def _hear(self, said: dict[str, Any]) -> None:
        self.version += 1
        if "ready" in said:
            self.state = "ready"
        elif "part" in said and self.messages:
            self.messages[-1]["text"] += said["part"]
        elif "answer" in said and self.messages:
            self.messages[-1]["text"] = said["answer"]
            self.state = "ready"
        elif "error" in said:
            self.error = said["error"]
            if self.state == "answering":
                self.messages = self.messages[:-2]
                self.state = "ready"
