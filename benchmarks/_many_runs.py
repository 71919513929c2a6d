"""Several runs of LongFactory's commands, one after another, each in processes of its own that have
imported everything already, so that a GPU does not wait for Python to start.

    python benchmarks/_many_runs.py 4 JOBS.json           # four processes a run
    python benchmarks/_many_runs.py 1 JOBS.json FILE      # begins when there are such files

Run by `many_gpus.py` and `models.py`. A job is {"name", "command", "words"}: each process calls what
`longfactory COMMAND WORDS...` calls in it. This process imports what they need and is forked for
each; it claims no GPU, so that a run finds what it would find alone: nothing compiled for other
shapes, no memory that an earlier one held. (Where something has claimed one all the same, each
process starts anew.) A line `RESULT {...}` is printed after each job; one that fails does not stop
the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing.process
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at GPUs claims none

GRACE = 5.0  # seconds that the others of a run have, after one failed


def main() -> int:
    begun = time.time()
    import longfactory.train.run  # noqa: F401  what a run imports, before the GPUs are free

    print(f"Imported in {time.time() - begun:.1f} s", flush=True)
    for file in sys.argv[2:]:
        while not Path(file).exists():
            time.sleep(0.1)
    size, jobs = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    forks = not driver_started()
    if not forks:
        print("An import has started the GPU's driver: each process starts anew.", flush=True)
    gc.collect()
    gc.freeze()
    for job in jobs:
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            error = in_processes(job, size, Path(folder), forks)
        found = {"name": job["name"], "seconds": time.time() - begun}
        print("RESULT " + json.dumps(found | ({"error": error} if error else {})), flush=True)
    return 0


def driver_started() -> bool:
    """Whether this process has started CUDA's driver, which a forked process could not use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    not_initialised = 3
    count = ctypes.c_int()
    return bool(driver.cuDeviceGetCount(ctypes.byref(count)) != not_initialised)


def in_processes(job: dict[str, Any], size: int, folder: Path, forks: bool) -> str | None:
    """Runs a job; what the first process that failed says, or None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [environment_of(rank, size, port) for rank in range(size)]
    sys.stdout.flush()
    sys.stderr.flush()
    running = {}
    for rank, place in enumerate(places):
        report = folder / f"failed-{rank}"
        if forks:
            pid = os.fork()
            if pid == 0:
                work(job, place, report)
        else:
            words = [sys.executable, "-u", __file__, "--work", json.dumps(job), str(report)]
            pid = subprocess.Popen(words, env={**os.environ, **place}).pid
        running[pid] = report
    first: str | None = None
    end = float("inf")
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            report = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and first is None:
                first = report.read_text() if report.exists() else f"its process ended with {code}"
                end = time.time() + GRACE
        if time.time() > end:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return first


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process; of one process nothing."""
    if size == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def work(job: dict[str, Any], place: dict[str, str], report: Path) -> NoReturn:
    """What one process does, to its end."""
    os.environ.update(place)
    # of the process that this one was forked from: not this one's to end
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    code = 1
    try:
        from longfactory import cli

        commands = {"train": cli.train, "verify": cli.verify}
        code = int(commands[job["command"]](job["words"]) or 0)
    except BaseException as error:
        traceback.print_exc()
        report.write_text(f"{type(error).__name__}: {error}".splitlines()[0][:300])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):  # ends loaders
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(json.loads(sys.argv[2]), {}, Path(sys.argv[3]))
    sys.exit(main())
