"""The part `resume` of `many_gpus.py`: a run whose process is killed goes on over fewer GPUs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _many_commands import PLAIN, environment, logged, side_by_side, train, words_of, workplace
from _many_models import model_folder, on_gpus
from _many_table import Row, earlier, keep
from _table import MARK, end_marked
from longfactory.sp.distance import worst
from sp_training import make_data

ROOT = Path(__file__).resolve().parent.parent


def resume(a: argparse.Namespace) -> int:
    """A run over all GPUs, its last process killed after a checkpoint, resumed over half of them;
    losses beside those of a run that nothing ended.
    """
    steps, saved = 8, 2
    local = 256 if a.smoke else 1024
    half = max(1, a.gpus // 2)
    rows = earlier(a)
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-0.5b", 2)
        make_data(home / "data", steps, 2 * local * a.gpus)

        def keys(n: int, **more: Any) -> Row:
            return {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": local * a.gpus,
                "sequence_parallel_size": n,
                "sequence_parallel_mode": "zigzag-ring",
                "gradient_accumulation_steps": 1,
                "max_steps": steps,
                "save_strategy": "steps",
                "save_steps": saved,
                "overwrite_output_dir": "false",
                **on_gpus(a, n),
                **more,
            }

        limit = max(30.0, a.end - time.time())
        whole = functools.partial(
            train, home, "whole", range(a.gpus), keys(a.gpus, save_strategy="no"), limit
        )
        broken = functools.partial(killed, home, range(a.gpus), keys(a.gpus), saved + 1, limit)
        straight, ended = side_by_side([whole, broken])
        row: Row = {"row": f"killed at SP {a.gpus}, resumed at SP {half}"} | ended
        if "error" not in row:
            again = train(home, "killed", range(half), keys(half), limit)
            row |= {k: v for k, v in again.items() if k in ("error", "seconds in all")}
            after = {x["current_steps"]: x["loss"] for x in logged(home / "out-killed")}
            expected = straight.get("losses", [])
            if len(expected) == len(after) == steps:
                row["largest relative difference of losses"] = worst(
                    abs(after[i + 1] - loss) / abs(loss) for i, loss in enumerate(expected)
                )
            else:
                row.setdefault("error", f"steps: {sorted(after)}; without a stop {len(expected)}")
        keep(a, row, rows)
    return int("error" in row)


RESUME_NOTE = (
    "Qwen2.5-0.5B's shape, two layers, random weights, all parameters, rows of 1,024 tokens a GPU, 8"
    " steps, a checkpoint every two. The process of the last rank is sent SIGKILL after the third"
    " step. Losses of all steps beside those of a run that nothing ended."
)


def killed(home: Path, devices: Sequence[int], keys: Row, step: int, limit: float) -> Row:
    """A run whose process of the last rank is sent SIGKILL when `step` steps are done."""
    out = home / "out-killed"
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    words = words_of("train", {**PLAIN, "nproc_per_node": len(devices), "output_dir": out, **keys})
    begun = time.time()
    with open(home / "killed.txt", "w") as text:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=text,
            stderr=subprocess.STDOUT,
            env={**environment(home, devices), MARK: mark},
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.time() - begun < limit:
                if len(logged(out)) >= step and (victim := rank_of(mark, len(devices) - 1)):
                    os.kill(victim, signal.SIGKILL)
                    process.wait(limit)
                    break
                time.sleep(0.05)
        finally:
            end_marked(mark, process.pid)
    done = [x["current_steps"] for x in logged(out)]
    said = (home / "killed.txt").read_text()
    if process.returncode in (0, None):
        return {"error": f"the run ended with {process.returncode} before a process was killed"}
    print(said[-1500:], file=sys.stderr, flush=True)
    return {"killed after steps": max(done, default=0), "exit status": process.returncode}


def rank_of(mark: str, rank: int) -> int | None:
    """The process of a run that has this rank."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                if f"{MARK}={mark}".encode() in words and f"RANK={rank}".encode() in words:
                    return int(entry.name)
    return None
