"""Runs of LongFactory's commands for `many_gpus.py`: by the command, or several for which
Python starts once; and what their logs say.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _many_table import Row
from _table import MARK, end_marked, of_visible
from plan_accuracy import TOO_LONG, ended_in_time

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class Job(NamedTuple):
    """A run in a group's processes: the command's keys, and its further words."""

    name: str
    keys: Row
    command: str = "train"
    words: tuple[str, ...] = ()


def in_one_group(
    home: Path,
    devices: Sequence[int | str],
    jobs: Sequence[Job] | Callable[[], Sequence[Job]],
    end: float,
    tell: Callable[[str, Row], None] = lambda name, row: None,
    after: Path | None = None,
    read: Callable[[str, Path], Row] = lambda text, out: planned(text) | timed(out),
    show: str = "",
) -> dict[str, Row]:
    """Runs one after another, forked from one process (`_many_runs.py`): Python starts once.

    Args:
        devices: a process each; one is a run without a launcher.
        jobs: or what makes them, called while Python starts.
        end: when the group is ended, if it is not done.
        tell: called with a run's name and row as it ends.
        after: the first run begins when there is such a file.
        read: makes a run's row from what it wrote and its output_dir.
        show: a pattern; lines in which it is found are printed as they come.
    """
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    file = home / f"jobs-{mark}.json"
    command = [sys.executable, "-u", str(ROOT / "benchmarks" / "_many_runs.py"), str(len(devices))]
    env = {**environment(home, devices), MARK: mark}
    env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 8)))
    waiting = [] if after is None else [after]
    process = subprocess.Popen(
        [*command, *map(str, (file, *waiting))],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(max(1.0, end - time.time()), end_marked, (mark, process.pid))
    timer.daemon = True
    timer.start()
    made = jobs() if callable(jobs) else jobs
    write_jobs(file, home, made)
    found: dict[str, Row] = {}
    text: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("RESULT "):
            text.append(line)
            if show and re.search(show, line):
                print(line, end="", flush=True)
            continue
        fact = json.loads(line[7:])
        if fact["name"] in found:  # of another process, whose run failed, too
            continue
        row = {"seconds in all": round(fact["seconds"])}
        if "error" in fact:
            row |= planned("".join(text)) | timed(home / f"out-{fact['name']}")
            row["error"] = fact["error"]
            print("".join(text)[-3000:], file=sys.stderr, flush=True)
        else:
            row |= read("".join(text), home / f"out-{fact['name']}")
        text.clear()
        found[fact["name"]] = row
        tell(fact["name"], row)
    process.wait()
    timer.cancel()
    end_marked(mark, process.pid)
    missing = [each.name for each in made if each.name not in found][:1]
    for name in missing:
        late = time.time() >= end - 1
        row = failure(TOO_LONG if late else process.returncode, "".join(text))
        found[name] = row | timed(home / f"out-{name}")
        tell(name, found[name])
    return found


def write_jobs(file: Path, home: Path, jobs: Sequence[Job]) -> None:
    """The jobs as `_many_runs.py` reads them; the file is there when it is complete."""
    listed = []
    for each in jobs:
        keys = {"output_dir": home / f"out-{each.name}", **each.keys}
        keys = {**PLAIN, **keys} if each.command == "train" else keys
        words = [f"{key}={value}" for key, value in keys.items()] + list(each.words)
        listed.append({"name": each.name, "command": each.command, "words": words})
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(listed))
    beside.rename(file)


def timed(out: Path) -> Row:
    """What a run's log says of its steps: losses, seconds of the first and of a later one, tokens of
    a step, peak.
    """
    steps, row = logged(out), {}
    if steps:
        row["losses"] = [x["loss"] for x in steps]
        row["first step s"] = steps[0]["elapsed_seconds"]
        row["peak GiB"] = steps[-1].get("vram_allocated")
        row["tokens"] = steps[0].get("total_tokens")
    if len(steps) > 1:
        between = len(steps) - 1
        row["tokens"] = (steps[-1]["total_tokens"] - steps[0]["total_tokens"]) // between
        row["step s"] = (steps[-1]["elapsed_seconds"] - steps[0]["elapsed_seconds"]) / between
    return row


PLAIN: Row = {
    "stage": "pt",
    "finetuning_type": "full",
    "dataset": "long",
    "packing": "false",
    "per_device_train_batch_size": 1,
    "learning_rate": "1e-5",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "save_final_model": "false",
    "overwrite_output_dir": "true",
    "disable_shuffling": "true",
    "include_num_input_tokens_seen": "true",
    "report_to": "none",
    "bf16": "true",
    "preprocessing_num_workers": 1,
}


def train(home: Path, name: str, devices: Sequence[int], keys: Row, limit: float) -> Row:
    """One run of `longfactory train` on some GPUs, by the command: see `timed`."""
    out = home / f"out-{name}"
    keys = {**PLAIN, "nproc_per_node": len(devices), "output_dir": out, **keys}
    begun = time.time()
    code, text = ended_in_time(words_of("train", keys), environment(home, devices), limit)
    row: Row = {"seconds in all": round(time.time() - begun), **planned(text)}
    if code:
        row |= failure(code, text)
    return row | timed(out)


def words_of(command: str, keys: Row) -> list[str]:
    """One of LongFactory's commands, as a process is started."""
    words = [sys.executable, "-m", "longfactory.cli", command]
    return words + [f"{key}={value}" for key, value in keys.items()]


def environment(home: Path, devices: Sequence[int | str]) -> dict[str, str]:
    """Of a run on some GPUs, of those that are visible: no network, a cache of its own."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    own = {
        "RECORD_VRAM": "1",
        "LONGFACTORY_CACHE": str(home / "cache"),
        "CUDA_VISIBLE_DEVICES": of_visible(devices),
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **own}


def planned(text: str) -> Row:
    """What a run's log says of its memory plan."""
    row: Row = {}
    if (settings := re.search(r"Memory plan.*\n +(.*)", text)) is not None:
        row["settings"] = settings[1]
    if (seconds := re.search(r"predicted: ([0-9.,]+) s (?:a|per) row", text)) is not None:
        row["predicted s"] = float(seconds[1].replace(",", ""))
    if (schedule := re.findall(r"sequence parallelism, rows like .*", text)) != []:
        row["schedule"] = schedule[-1][-120:]
    return row


def logged(out: Path) -> list[Row]:
    """The steps in a run's log."""
    log = out / "trainer_log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    return [x for x in lines if "loss" in x]


def failure(code: int, text: str) -> Row:
    """Of a run that ended with an error: its last line, and the end of its log."""
    print(text[-3000:], file=sys.stderr, flush=True)
    words = [line for line in text.splitlines() if line.strip()]
    why = words[-1][:200] if words else "no output"
    return {"error": f"ended, its time was up: {why}" if code == TOO_LONG else why}


def side_by_side(jobs: Sequence[Callable[[], Row]], most: int = 8) -> list[Any]:
    """Runs at once, at most so many."""
    with concurrent.futures.ThreadPoolExecutor(min(most, len(jobs))) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]
