"""Starts the rows of a table (`_peers.py`), within a time limit, and writes what they report beside
what was measured before.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GiB = 2**30
LEAST = 15.0  # seconds: with less left no row is started
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
MARK = "LONGFACTORY_BENCHMARK_ROW"
PLAIN: dict[str, Any] = {
    "name": "",
    "layers": None,
    "memory": "auto",
    "mode": "zigzag-ring",
    "host_share": 1.0,
}
"""Keys of a job that make it another measurement, and what they usually are."""


class Clock:
    """Seconds left of the whole command; none once a signal has stopped it."""

    def __init__(self, limit: float) -> None:
        self.end = time.time() + limit
        self.signal: int | None = None

    @property
    def left(self) -> float:
        return self.end - time.time()

    def stop(self, signum: int) -> None:
        self.signal, self.end = signum, 0.0

    @property
    def why(self) -> str:
        """Why there is no time left."""
        return (
            "the time of this command is up"
            if self.signal is None
            else f"{signal.Signals(self.signal).name} ended this command"
        )

    def exit_code(self, failed: bool) -> int:
        return int(failed) if self.signal is None else 128 + self.signal


def run_row(
    job: dict[str, Any],
    gpus: int,
    clock: Clock,
    log: Path,
    script: Path = HERE / "_peers.py",
    tell: Callable[[dict[str, Any]], None] = lambda fact: None,
) -> list[dict[str, Any]]:
    """The results of one row; an entry with `error` for what did not run. `tell` is called with each
    that is measured as it comes.

    Its output goes to `log`, its results, and lines that begin with NOTE, to the screen as they
    come. When the time is up, or
    SIGTERM, SIGINT or SIGHUP reaches this process, every process of the row is ended, also those
    that its launcher put into sessions of their own; what was measured is returned.
    """
    if clock.left < LEAST:
        return [_stamped({**_about(job, gpus), "error": f"not started: {clock.why}"})]
    command = [sys.executable, "-u"]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command += [str(script), json.dumps(job)]
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        MARK: mark,
    }
    env.setdefault("NCCL_NVLS_ENABLE", "0")
    # torchrun's own would be 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    # the first is the name from torch 2.10 on
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        env.setdefault(name, "expandable_segments:True")
    found: list[dict[str, Any]] = []
    begun = time.time()
    print(f"--- {job['row']} ({job.get('kernel', 'auto')}), {clock.left:.0f} s left", flush=True)
    with open(log, "a") as out, ended_by_signals(clock):
        out.write(f"--- {json.dumps(job)}\n")
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

        def end() -> None:
            while process.poll() is None and clock.left > 0:
                time.sleep(0.1)
            end_marked(mark, process.pid)

        # A thread: this one reads until the last process that holds the pipe is gone.
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            out.flush()
            if line.startswith("NOTE "):
                print("       " + line[5:], end="", flush=True)
            if line.startswith("RESULT "):
                fact = json.loads(line[7:])
                found.append(fact)
                print("    " + _short(fact), flush=True)
                tell(_stamped(fact))
        process.wait()
        ending.join()
    if process.returncode < 0 or (process.returncode and not any("error" in f for f in found)):
        done = {f["tokens"] for f in found}
        missing = next((t for t in job["tokens"] if t not in done), None)
        if missing is not None:
            why = (
                f"stopped: {clock.why}"
                if clock.left <= 1
                else f"the process ended with {process.returncode}, see the log"
            )
            found.append({**_about(job, gpus), "tokens": missing, "error": why})
            print("    " + _short(found[-1]), flush=True)
    print(f"    took {time.time() - begun:.0f} s", flush=True)
    return [_stamped(f) for f in _one_error(found)]


@contextlib.contextmanager
def ended_by_signals(clock: Clock) -> Iterator[None]:
    """While open, signals that would end this process stop the clock instead, which ends its rows, so
    that nothing is left behind or lost. Only the main thread may hold it; in others it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        clock.stop(signum)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _marked(mark: str) -> list[int]:
    """Living processes whose environment carries the mark: it is inherited, whatever session or
    parent they have by now.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_marked(mark: str, leader: int) -> None:
    """Ends every process of a row: SIGTERM, then SIGKILL. Without /proc only the group of its first
    process, `leader`, can be found.
    """
    if not Path("/proc").is_dir():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        return
    killing = time.monotonic() + GRACE
    asked: set[int] = set()
    while left := _marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                if time.monotonic() >= killing:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
        asked |= set(left)
        time.sleep(0.1)


def variant(job: Mapping[str, Any]) -> dict[str, Any]:
    """What tells this job's results from those of the plain job."""
    return {k: job[k] for k, plain in PLAIN.items() if job.get(k, plain) != plain}


def _about(job: dict[str, Any], gpus: int) -> dict[str, Any]:
    return {
        "row": job["row"],
        "kernel": job.get("kernel", "auto"),
        "tokens": job["tokens"][0],
        "gpus": gpus,
        **variant(job),
    }


def of_visible(numbers: Iterable[int | str]) -> str:
    """CUDA_VISIBLE_DEVICES for some of the GPUs that this process may use, counted from 0."""
    shown = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    return ",".join(shown[int(number)] if shown else str(number) for number in numbers)


def command_line() -> str:
    """This command as a reader would type it, without where its results went."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--out":
            next(given, None)
        elif not word.startswith("--out="):
            words.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def _stamped(fact: dict[str, Any]) -> dict[str, Any]:
    return {
        **fact,
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _one_error(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rank may report that memory ran out; one report is enough."""
    out: list[dict[str, Any]] = []
    for fact in found:
        if "error" not in fact or not any(
            "error" in o and o["tokens"] == fact["tokens"] for o in out
        ):
            out.append(fact)
    return out


def _short(f: dict[str, Any]) -> str:
    if "error" in f:
        return f"{f['tokens']:>9,} tokens: {f['error']}"
    if "gemm" in f:
        return f"{f['tokens']:>9,} tokens: " + ", ".join(
            f"{k} {f[k] / 1e12:.0f} TFLOP/s"
            for k in ("gemm", "attention_forward", "attention_backward")
        )
    rate = f["tokens"] / f["gpus"] / f["seconds"]
    return (
        f"{f['tokens']:>9,} tokens: {f['seconds']:.2f} s, {rate:,.0f} tokens/s a GPU, peak"
        f" {f['peak'] / GiB:.1f} GiB, loss {f['loss']:.4f}"
    )


def machine_name() -> str:
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "cpu"
    return out.splitlines()[0].strip().replace("NVIDIA ", "") if out.strip() else "cpu"


def settings_line(s: dict[str, Any]) -> str:
    """Memory settings in a few words."""
    parts = [f"keep {s['keep_attention']:g}", f"offload {s['offload']}"]
    if s["offload"] != "none":
        parts.append(f"last {s['last_layers_on_gpu']} on GPU")
    parts.append(f"chunks {s['mlp_chunk'] or 'none'}")
    if s["attention_groups"] > 1:
        parts.append(f"groups {s['attention_groups']}")
    if s["segment_layers"] > 1:
        parts.append(f"segments {s['segment_layers']}")
    parts.append(f"optimizer {s['optimizer']}")
    if s.get("gradients") == "host":
        parts.append("gradients host")
    return ", ".join(parts)


def _key(fact: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(fact[k] for k in ("row", "kernel", "tokens", "gpus")) + tuple(
        fact.get(k, plain) for k, plain in PLAIN.items()
    )


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier results with the new ones in their places: one of a key (row, kernel, tokens, GPUs
    and what differs from the plain job).

    A measurement replaces whatever was there; an error only an error. Rows keep the order in which
    they first came, lengths ascend.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for fact in (*old, *new):
        before = kept.get(_key(fact))
        if before is None or "error" in before or "error" not in fact:
            kept[_key(fact)] = fact

    def row(fact: Mapping[str, Any]) -> tuple[Any, ...]:
        return _key({**fact, "tokens": 0})

    order = {r: i for i, r in reversed(list(enumerate(map(row, kept.values()))))}
    return sorted(kept.values(), key=lambda fact: (order[row(fact)], fact["tokens"]))


def write(
    out: Path,
    name: str,
    title: str,
    render: Callable[[list[dict[str, Any]]], str],
    results: Sequence[dict[str, Any]],
    about: Mapping[str, Any],
) -> str:
    """Merges the results into `name`.json and renders the whole file into `name`.md. Returns the
    table.

    Each result keeps the command and the date that made it; `notes`, sentences added to the file by
    hand, stay and stand below the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    merged = merge(old.get("results", []), results)
    table = render(merged)
    _put(path, json.dumps({**old, **about, "results": merged}, indent=1) + "\n")
    _put(
        out / f"{name}.md",
        "\n\n".join([title, table, *old.get("notes", []), *_made_by(merged)]) + "\n",
    )
    return table


def _made_by(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each command, and day of it, whose measurements are in the table, with the
    versions that it ran.
    """
    made: dict[tuple[str, str], dict[str, str]] = {}
    for r in results:
        if "command" in r and "error" not in r:
            made.setdefault((r["command"], r["date"]), {}).update(r.get("versions", {}))
    return [
        f"`{c}` ({', '.join([day, *(f'{name} {v}' for name, v in found.items())])})"
        for (c, day), found in made.items()
    ]


def _put(path: Path, text: str) -> None:
    """Written beside and renamed: a command that is ended leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)


def log_file(name: str) -> Path:
    path = Path(tempfile.gettempdir()) / f"longfactory-{name}-{os.getpid()}.log"
    path.write_text("")
    return path


def job(row: str, tokens: list[int], **keys: Any) -> dict[str, Any]:
    return {"row": row, "tokens": tokens, **keys}
