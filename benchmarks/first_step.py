"""How long a user waits for the first step of `longfactory train`, and what for: with empty caches of
compiled kernels, and again with what the first run left in them.

    python benchmarks/first_step.py --gpus 0 --rows moe-6-layers-16k 7b-lora-32k --out DIR
    python benchmarks/first_step.py --render DIR/first_step.json --out benchmarks/results
    python benchmarks/first_step.py --smoke --out DIR        # a tiny shape on the CPU: does it run?

Rows are those of `models.py`, with random weights, and a slice of a hybrid model. Each run is the
command itself in processes of its own, imports included, and ends after one step. Its caches of torch
and Triton are folders of this command; those of CUDA and cuDNN are the machine's. The second run
finds its data tokenised, too. The numbers are those of the line that a run prints before its first
row (docs/progress.md), of the first process: `startup` in trainer_log.jsonl, and the line's counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import models  # noqa: E402
from _table import Clock, command_line, machine_name, of_visible, write  # noqa: E402
from plan_accuracy import FULL, PT, Setting, ended_in_time, keys_of  # noqa: E402

ROWS = {**models.ROWS, "qwen3.5-9b-8-layers-32k": Setting("qwen3.5-9b", 8, 32768, PT | FULL)}
EVERY = {**ROWS, **models.SMOKE}
RUNS = ("empty caches", "again")
BEFORE = ("launcher", "imports", "meeting")
"""Parts before the run reads its data."""
COUNTS = {
    "functions": "functions by torch",
    "kernels": "Triton kernels",
    "stored": "more Triton kernels from their cache",
}
TITLE = "# From the command to the end of the first step"


def started(
    name: str, run: str, gpus: list[str], home: Path, limit: float, cpu: bool
) -> dict[str, Any]:
    """One run of the command, in the form of `_table.py`'s results."""
    at = EVERY[name]
    whole = models.whole_row(at, len(gpus))
    keys = keys_of(name, whole, len(gpus), 1, home) | {"nproc_per_node": len(gpus)}
    keys |= {"use_cpu": "true", "bf16": "false"} if cpu else {}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "LONGFACTORY_CACHE": str(home / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / f"torch-{name}"),
        "TRITON_CACHE_DIR": str(home / f"triton-{name}"),
    }
    if not cpu:
        environment["CUDA_VISIBLE_DEVICES"] = of_visible(gpus)
    about = {"row": run, "kernel": "auto", "tokens": at.tokens, "gpus": len(gpus), "name": name}
    about |= {"command": command_line(), "date": models.today(), "machine": machine_name()}
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    command += [f"{key}={value}" for key, value in keys.items()]
    begun = time.monotonic()
    code, text = ended_in_time(command, environment, limit)
    if code:
        print(text[-3000:], flush=True)
        return {**about, "error": f"ended with {code} after {time.monotonic() - begun:.0f} s"}
    first = (home / f"out-{name}" / "trainer_log.jsonl").read_text().splitlines()[0]
    found = {"startup": json.loads(first)["startup"], **counted(text)}
    return {**about, **found, "versions": models.versions()}


def counted(text: str) -> dict[str, int]:
    """What the line of a run says was compiled."""
    line = re.search(r"From the command to the end of the first step: .*", text)
    found = {}
    for key, words in COUNTS.items():
        count = re.search(rf"(\d+) {words}", line[0] if line else "")
        found[key] = int(count[1]) if count else 0
    return found


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        "| row | GPUs | caches | all, s | launcher, imports, meeting | guard | first step |"
        " other parts | compiling, in guard and first step | functions by torch |"
        " Triton kernels compiled, cached |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(EVERY)
    for r in sorted(
        results, key=lambda r: (order.index(r["name"]), r["gpus"], r["row"] != RUNS[0])
    ):
        start = f"| {r['name']} | {r['gpus']} | {r['row']} |"
        if "error" in r:
            lines.append(f"{start} {r['error']} | | | | | | | |")
            continue
        of_these = {k: v for k, v in r["startup"].items() if k.startswith("of these")}
        parts = {k: v for k, v in r["startup"].items() if k not in of_these}
        before = sum(parts.get(name, 0.0) for name in BEFORE)
        guard, first = parts.get("guard", 0.0), parts["first step"]
        total = sum(parts.values())
        lines.append(
            f"{start} {total:.1f} | {before:.1f} | {guard:.1f} | {first:.1f} |"
            f" {total - before - guard - first:.1f} | {of_these.get('of these compiling', 0.0):.1f} |"
            f" {r['functions']} | {r['kernels']}, {r['stored']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="0", help="of the visible ones, counted from 0: 0 or 0,1")
    parser.add_argument("--rows", nargs="+", choices=EVERY, default=["moe-6-layers-16k"])
    parser.add_argument("--each", type=float, default=120, help="seconds for one run")
    parser.add_argument("--limit", type=float, default=480, help="seconds for the whole command")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it run?")
    parser.add_argument("--render", type=Path, nargs="*", help="results to merge")
    args = parser.parse_args()
    if args.render is not None:
        for path in args.render:
            found = json.loads(path.read_text())["results"]
            print(write(args.out, "first_step", TITLE, render, found, {}))
        return 0
    clock, failed = Clock(args.limit), False
    with tempfile.TemporaryDirectory(prefix="first-step-") as folder:
        for name in models.SMOKE if args.smoke else args.rows:
            for run in RUNS:
                if clock.left < 15:
                    print(f"{name}, {run}: not started, the time of this command is up", flush=True)
                    continue
                limit = min(args.each, clock.left)
                found = started(name, run, args.gpus.split(","), Path(folder), limit, args.smoke)
                failed |= "error" in found
                print(json.dumps(found), flush=True)
                table = write(args.out, "first_step", TITLE, render, [found], {})
    print(table)
    return clock.exit_code(failed)


if __name__ == "__main__":
    sys.exit(main())
