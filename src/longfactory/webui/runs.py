"""Runs in the chosen folders, by the files that they write: their logs as they grow, their keys,
their results, `verify`'s report. A line that cannot be read is counted, a file that is not there
any more is told; nothing that a run does ends the board.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from longfactory.config.fields import is_secret
from longfactory.config.folder import RUN_FILE
from longfactory.webui.folders import Folders

LOG_FILE = "trainer_log.jsonl"
STEP, TOTAL = "current_steps", "total_steps"
NO_CURVES = (STEP, TOTAL, "percentage", "epoch", "elapsed_seconds", "total_tokens")
"""Numbers of a log line that are no curve of their own."""
POINTS = 1000
"""Of a curve that are sent to the page, at most twice as many."""
LONGEST_LINE = 1 << 20
"""Bytes of a line; a longer one is not read."""
LARGEST_FILE = 4 << 20
"""Bytes of a YAML or JSON file that is read whole."""
HEAD = 256
"""Bytes by which a log is known again."""
BLOCK = 8 << 20
"""Bytes of a log that are read at a time."""
FRESH = 3.0
"""Seconds for which a look through the folders is taken for the present."""


@dataclasses.dataclass
class Log:
    """A `trainer_log.jsonl`, read as it grows."""

    path: Path
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    malformed: int = 0
    """Lines that are no object of JSON with a step."""
    gone: bool = False
    generation: int = 0
    """Goes up when the file begins anew: a run that starts again, or goes on from a checkpoint,
    rewrites it.
    """
    _inode: int = -1
    _head: bytes = b""
    _offset: int = 0
    _rest: bytes = b""

    def refresh(self) -> None:
        """Reads what has been added. Never raises for what a file holds or does."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                head = file.read(HEAD)
                another = found.st_ino != self._inode or found.st_size < self._offset
                # The number of a removed file may be given to the one that takes its place.
                if another or not head.startswith(self._head):
                    self._begin(found.st_ino)
                self._head = head
                file.seek(self._offset)
                while block := file.read(BLOCK):
                    self._offset += len(block)
                    self._take(block)
        except OSError:
            self.gone = True
            return
        self.gone = False

    def _begin(self, inode: int) -> None:
        self.rows, self.malformed, self._rest = [], 0, b""
        self._inode, self._head, self._offset = inode, b"", 0
        self.generation += 1

    def _take(self, block: bytes) -> None:
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            self._rest = self._rest[: LONGEST_LINE + 1]  # too long already: kept to be counted
        for line in lines:
            if line.strip():
                row = None if len(line) > LONGEST_LINE else numbers_of(line)
                if row is None:
                    self.malformed += 1
                else:
                    self.rows.append(row)


def numbers_of(line: bytes) -> dict[str, float] | None:
    """The finite numbers of a log line by name; None where it is no log line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not _is_number(found.get(STEP)):
        return None
    row = {str(name): float(value) for name, value in found.items() if _is_number(value)}
    seconds = found.get("elapsed_time")
    if "elapsed_seconds" not in row and isinstance(seconds, str):
        row |= _seconds(seconds)
    return row


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _seconds(text: str) -> dict[str, float]:
    """`1 day, 2:03:04` as LLaMA-Factory writes it."""
    days, _, clock = text.rpartition(", ")
    parts = clock.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        return {}
    whole = int(days.split()[0]) if days.split()[:1] and days.split()[0].isdigit() else 0
    hours, minutes, seconds = map(int, parts)
    return {"elapsed_seconds": float(whole * 86400 + hours * 3600 + minutes * 60 + seconds)}


def curves(rows: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """By name: [[steps], [values], [seconds], [tokens]]; of long ones the smallest and the largest
    of each stretch, so that no peak is left out.
    """
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row if name not in NO_CURVES)
    out = {}
    for name in names:
        points = [row for row in rows if name in row]
        kept = thinned([row[name] for row in points], POINTS)
        points = [points[i] for i in kept]
        out[name] = [
            [row[STEP] for row in points],
            [row[name] for row in points],
            [row.get("elapsed_seconds", -1.0) for row in points],
            [row.get("total_tokens", -1.0) for row in points],
        ]
    return out


def thinned(values: list[float], stretches: int) -> list[int]:
    """Indices of the first, the last, and in each stretch the smallest and the largest value."""
    count = len(values)
    if count <= 2 * stretches:
        return list(range(count))
    kept = {0, count - 1}
    for k in range(stretches):
        stretch = range(k * count // stretches, (k + 1) * count // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


class Board:
    """The runs of the chosen folders, for all viewers together."""

    def __init__(self, folders: Folders):
        self.folders = folders
        self.logs: dict[Path, Log] = {}
        self._looked = -math.inf
        self._lock = threading.Lock()
        self._files: dict[Path, tuple[tuple[int, int], Any]] = {}
        self._curves: dict[Path, tuple[str, dict[str, list[list[float]]]]] = {}

    def find(self, at_once: bool = False) -> list[Path]:
        """Folders that hold a run, the last written first. Those that have vanished stay until the
        server ends, and are told as gone.
        """
        with self._lock:
            now = time.monotonic()
            if at_once or now - self._looked > FRESH:
                for folder, files in self.folders.walk():
                    path = folder / LOG_FILE
                    if LOG_FILE in files and self.folders.holds(path):
                        self.logs.setdefault(folder, Log(path))
                self._looked = now
            return sorted(self.logs, key=_written_at, reverse=True)

    def name(self, folder: Path) -> str:
        """A run's folder, from the chosen one on."""
        root = next(r for r in self.folders.roots if r == folder or r in folder.parents)
        short = str(folder.relative_to(root))
        return root.name if short == "." else short

    def run(self, folder: Path, reports: Iterable[Path] = ()) -> dict[str, Any]:
        """All that the board shows of one run.

        Args:
            reports: of `verify`, that belong to it; the newest of them and of those in its folder
                is shown.
        """
        with self._lock:
            log = self.logs.setdefault(folder, Log(folder / LOG_FILE))
            log.refresh()
            rows, malformed, gone = list(log.rows), log.malformed, log.gone
            version = f"{log.generation}:{len(rows)}:{malformed}:{int(gone)}"
        last = rows[-1] if rows else {}
        drawn = self._curves.get(folder)
        if drawn is None or drawn[0] != version:
            drawn = self._curves[folder] = (version, curves(rows))
        return {
            "folder": str(folder),
            "name": self.name(folder),
            "version": version,
            "gone": gone,
            "malformed": malformed,
            "step": last.get(STEP),
            "steps": last.get(TOTAL),
            "updated": _written_at(folder),
            "curves": drawn[1],
            "keys": self.keys(folder),
            "results": self.results(folder),
            "verify": self.verify(folder, reports),
        }

    def last_row(self, folder: Path, since: float) -> dict[str, float]:
        """The last line of a run's log; empty where there is none, or the log was last written
        before that time: then it is of another run in the same folder.
        """
        if not self.folders.holds(folder / LOG_FILE) or _written_at(folder) < since:
            return {}
        with self._lock:
            log = self.logs.setdefault(folder, Log(folder / LOG_FILE))
            log.refresh()
            if not log.rows and log.gone:
                del self.logs[folder]  # not there yet: no run to be shown
                return {}
            return dict(log.rows[-1]) if log.rows else {}

    def keys(self, folder: Path) -> dict[str, Any]:
        """The run's keys as it has resolved them, without secrets."""
        found = self._read(folder / RUN_FILE)
        if not isinstance(found, dict):
            return {}
        plain = {str(name): value for name, value in found.items() if not is_secret(str(name))}
        return json.loads(json.dumps(plain, default=str))

    def results(self, folder: Path) -> dict[str, Any]:
        """What the run has come to at its end."""
        found = self._read(folder / "all_results.json")
        if not isinstance(found, dict):
            return {}
        return {str(name): value for name, value in found.items() if _is_number(value)}

    def verify(self, folder: Path, reports: Iterable[Path] = ()) -> dict[str, Any] | None:
        """`verify`'s report in short; None where there is none."""
        try:
            own = [path for path in folder.glob("verify*.json") if self.folders.holds(path)]
        except OSError:
            own = []
        for path in sorted([*own, *reports], key=_modified, reverse=True):
            found = self._read(path)
            if isinstance(found, dict) and isinstance(found.get("exact"), bool):
                return summary(found)
        return None

    def _read(self, path: Path) -> Any:
        """The content of a small YAML or JSON file inside the chosen folders, read again where it
        has changed; None where it cannot be read.
        """
        try:
            stat = path.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            known = self._files.get(path)
            if known is not None and known[0] == state:
                return known[1]
            if stat.st_size > LARGEST_FILE or not self.folders.holds(path):
                return None
            text = path.read_text(encoding="utf-8")
            loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            found = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=loader)
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return None
        self._files[path] = (state, found)
        return found


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What the board shows of a report: the verdict, the two numbers, the checks."""

    def deviation(name: str) -> dict[str, Any]:
        found = report.get(name)
        names = ("split", "alone", "difference", "own", "allowed")
        return {n: found.get(n) for n in names} if isinstance(found, dict) else {}

    checks = report.get("checks")
    return {
        "exact": report["exact"],
        "title": str(report.get("title", "")),
        "loss": deviation("loss"),
        "grad_norm": deviation("grad_norm"),
        "logps": deviation("logps"),
        "parameters": len(report.get("parameters") or ()),
        "checks": [
            {key: str(check.get(key, "")) for key in ("name", "state", "words")}
            for check in (checks if isinstance(checks, list) else ())
            if isinstance(check, dict)
        ],
        "reasons": [str(x) for x in report.get("reasons") or ()],
        "conclusion": report.get("conclusion"),
    }


def differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keys in which runs differ, each with its value in every run; a key that a run's file does not
    have is None.
    """
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(run["keys"])
    found = []
    for name in names:
        values = [run["keys"].get(name) for run in runs]
        if any(value != values[0] for value in values[1:]):
            found.append({"key": name, "values": values})
    return found


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _written_at(folder: Path) -> float:
    return _modified(folder / LOG_FILE)
