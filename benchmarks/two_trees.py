"""Throughput of this tree and of another checkout of it, alternating, on the GPUs of one machine.

    git worktree add ../before v0.1
    python benchmarks/two_trees.py --other ../before --tokens 32768 --layers 4 --runs 5 \
        --out benchmarks/results/two_trees.json

Each run is `throughput.py --rows ours` of one of the trees in a process of its own: other, this,
other, this... The median step of each tree over its runs, and their ratio, are what a change may
cost. Exit status 1 where this tree is slower by more than `--most`, or a run failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _table import GiB, command_line, machine_name

HERE = Path(__file__).resolve().parent


def run(tree: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one run: seconds a step, bytes of the peak, the loss; or `error`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(tree / "benchmarks" / "throughput.py"), "--rows", "ours"]
        command += ["--gpus", str(args.gpus), "--tokens", str(args.tokens), "--shape", args.shape]
        command += ["--steps", str(args.steps), "--limit", str(args.limit), "--out", out]
        if args.layers is not None:
            command += ["--layers", str(args.layers)]
        done = subprocess.run(command, capture_output=True, text=True)
        files = list(Path(out).glob("*.json"))
        if not files:
            return {"error": (done.stdout + done.stderr)[-2000:]}
        return json.loads(files[0].read_text())["results"][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="the other checkout")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--runs", type=int, default=5, help="of each tree")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a run")
    parser.add_argument("--most", type=float, default=0.03, help="share that may be lost")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    trees = {"other": args.other.resolve(), "this": HERE.parent}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for number in range(args.runs):
        for name, tree in trees.items():
            result = run(tree, args)
            found[name].append(result)
            said = result.get("error") or f"{result['seconds']:.4f} s, loss {result['loss']:.6f}"
            print(f"{number} {name}: {said}", flush=True)
    seconds = {n: [r["seconds"] for r in rs if "seconds" in r] for n, rs in found.items()}
    if any(len(s) < args.runs for s in seconds.values()):
        print("A run failed: nothing is compared.")
        return 1
    median = {name: statistics.median(s) for name, s in seconds.items()}
    ratio = median["this"] / median["other"]
    peaks = {name: max(r["peak"] for r in rs) / GiB for name, rs in found.items()}
    print(
        f"{machine_name()}: other {median['other']:.4f} s ({peaks['other']:.2f} GiB), this"
        f" {median['this']:.4f} s ({peaks['this']:.2f} GiB), this / other {ratio:.4f}"
    )
    if args.out is not None:
        report = {
            "machine": machine_name(),
            "command": command_line(),
            "median_seconds": median,
            "this_over_other": ratio,
            "peak_gib": peaks,
            "runs": found,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(ratio > 1 + args.most)


if __name__ == "__main__":
    raise SystemExit(main())
