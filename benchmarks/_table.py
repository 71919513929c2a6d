"""Starts the rows of a table (`_peers.py`), within a time limit, and writes what they report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GiB = 2**30


class Clock:
    """Seconds left of the whole command."""

    def __init__(self, limit: float) -> None:
        self.end = time.time() + limit

    @property
    def left(self) -> float:
        return self.end - time.time()


def run_row(job: dict[str, Any], gpus: int, clock: Clock, log: Path) -> list[dict[str, Any]]:
    """The results of one row; an entry with `error` for what did not run. Its output goes to `log`, its results to the screen as they come."""  # noqa: E501
    if clock.left < 15:
        return [{**_about(job, gpus), "error": "not started: the time of this command is up"}]
    command = [sys.executable, "-u"]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command += [str(HERE / "_peers.py"), json.dumps(job)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])}
    env.setdefault("NCCL_NVLS_ENABLE", "0")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # the first is the name from torch 2.10 on
        env.setdefault(name, "expandable_segments:True")
    found: list[dict[str, Any]] = []
    begun = time.time()
    print(f"--- {job['row']} ({job.get('kernel', 'auto')}), {clock.left:.0f} s left", flush=True)
    with open(log, "a") as out:
        out.write(f"--- {json.dumps(job)}\n")
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        late = threading.Timer(max(1.0, clock.left), lambda: os.killpg(process.pid, signal.SIGKILL))
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            out.flush()
            if line.startswith("RESULT "):
                fact = json.loads(line[7:])
                found.append(fact)
                print("    " + _short(fact), flush=True)
        process.wait()
        late.cancel()
    if process.returncode < 0 or (process.returncode and not any("error" in f for f in found)):
        done = {f["tokens"] for f in found}
        missing = next((t for t in job["tokens"] if t not in done), None)
        if missing is not None:
            why = (
                "stopped: the time of this command is up"
                if clock.left <= 1
                else f"the process ended with {process.returncode}, see the log"
            )
            found.append({**_about(job, gpus), "tokens": missing, "error": why})
            print("    " + _short(found[-1]), flush=True)
    print(f"    took {time.time() - begun:.0f} s", flush=True)
    return _one_error(found)


def _about(job: dict[str, Any], gpus: int) -> dict[str, Any]:
    return {"row": job["row"], "kernel": job.get("kernel", "auto"), "tokens": job["tokens"][0], "gpus": gpus}


def _one_error(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rank may report that memory ran out; one report is enough."""
    out: list[dict[str, Any]] = []
    for fact in found:
        if "error" not in fact or not any("error" in o and o["tokens"] == fact["tokens"] for o in out):
            out.append(fact)
    return out


def _short(f: dict[str, Any]) -> str:
    if "error" in f:
        return f"{f['tokens']:>9,} tokens: {f['error']}"
    if "gemm" in f:
        return f"{f['tokens']:>9,} tokens: " + ", ".join(
            f"{k} {f[k] / 1e12:.0f} TFLOP/s" for k in ("gemm", "attention_forward", "attention_backward")
        )
    rate = f["tokens"] / f["gpus"] / f["seconds"]
    return (
        f"{f['tokens']:>9,} tokens: {f['seconds']:.2f} s, {rate:,.0f} tokens/s a GPU, peak {f['peak'] / GiB:.1f} GiB, loss {f['loss']:.4f}"
    )


def machine_name() -> str:
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "cpu"
    return out.splitlines()[0].strip().replace("NVIDIA ", "") if out.strip() else "cpu"


def settings_line(s: dict[str, Any]) -> str:
    """Memory settings in a few words."""
    parts = [f"keep {s['keep_attention']:g}", f"offload {s['offload']}"]
    if s["offload"] != "none":
        parts.append(f"last {s['last_layers_on_gpu']} on GPU")
    parts.append(f"pieces {s['mlp_chunk'] or 'none'}")
    if s["attention_groups"] > 1:
        parts.append(f"groups {s['attention_groups']}")
    if s["segment_layers"] > 1:
        parts.append(f"segments {s['segment_layers']}")
    parts.append(f"optimizer {s['optimizer']}")
    return ", ".join(parts)


def write(out: Path, name: str, title: str, table: str, results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """`name`.json with every result and `name`.md with the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    (out / f"{name}.md").write_text(f"{title}\n\n{table}\n")


def log_file(name: str) -> Path:
    path = Path(tempfile.gettempdir()) / f"longfactory-{name}-{os.getpid()}.log"
    path.write_text("")
    return path


def job(row: str, tokens: list[int], **keys: Any) -> dict[str, Any]:
    return {"row": row, "tokens": tokens, **keys}
