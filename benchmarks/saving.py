"""Time and size of a checkpoint, and of going on from it, in this tree and in another checkout.

    git worktree add ../before v0.1
    python benchmarks/saving.py --other ../before --shape qwen2.5-0.5b \
        --out benchmarks/results/saving

Each run is `longfactory train` of a tree in a process of its own, one GPU or CPU, full parameters
with AdamW in fp32: a checkpoint after each step, then the same command from the last of them. The
trees alternate: other, this, other, this... The first save of each run is left out. A save is timed
from the call to its return (this tree flushes its files to the disk and writes their checksums); a
start is the time from `cli.main` to the first step's end, once from the beginning and once from a
checkpoint (this tree checks every file before it is read).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from _table import command_line, machine_name
from make_model import make_model

HERE = Path(__file__).resolve().parent
GB = 1e9


def keys(home: Path, steps: int, cpu: bool) -> dict[str, Any]:
    return {
        "model_name_or_path": home / "model",
        "train_from_scratch": "true",
        "stage": "sft",
        "do_train": "true",
        "finetuning_type": "full",
        "dataset": "talks",
        "dataset_dir": home,
        "template": "chatml",
        "cutoff_len": 128,
        "output_dir": home / "out",
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": "1e-5",
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "optim": "adamw_torch",
        "report_to": "none",
        "preprocessing_num_workers": 1,
        **({"use_cpu": "true"} if cpu else {"bf16": "true"}),
    }


def child(home: Path, steps: int, cpu: bool) -> None:
    """One run in this process; writes what it measured into `home/measured.json`."""
    from longfactory import cli
    from longfactory.train.trainer import RowTrainer

    saves: list[float] = []
    first: list[float] = []
    save, step = RowTrainer._save_checkpoint, RowTrainer.training_step

    def timed(self: Any, *args: Any, **more: Any) -> Any:
        begun = time.perf_counter()
        done = save(self, *args, **more)
        saves.append(time.perf_counter() - begun)
        return done

    def stepped(self: Any, *args: Any, **more: Any) -> Any:
        loss = step(self, *args, **more)
        loss.item()
        if not first:
            first.append(time.perf_counter() - started)
        return loss

    RowTrainer._save_checkpoint = timed  # type: ignore[method-assign]
    RowTrainer.training_step = stepped  # type: ignore[method-assign]
    words = ["train", *(f"{k}={v}" for k, v in keys(home, steps, cpu).items())]
    sys.argv = ["longfactory", *words]
    started = time.perf_counter()
    status = cli.main(words)
    measured = {"status": status, "saves": saves, "first_step": first[0]}
    (home / "measured.json").write_text(json.dumps(measured))


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def start(tree: Path, home: Path, steps: int, cpu: bool) -> dict[str, Any]:
    """A run of a tree in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    paths = [str(tree / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LONGFACTORY_CACHE": str(home / "c")}
    command = [sys.executable, __file__, "--child", str(home), "--steps", str(steps)]
    done = subprocess.run(
        [*command, *(["--cpu"] if cpu else [])], env=env, capture_output=True, text=True
    )
    measured = home / "measured.json"
    if done.returncode or not measured.exists():
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return json.loads(measured.read_text())


def run(tree: Path, shape: str, steps: int, cpu: bool) -> dict[str, Any]:
    """Saves and a continuation of one tree, in a new folder."""
    with tempfile.TemporaryDirectory(prefix="saving-") as name:
        home = Path(name)
        make_model(shape, home / "model")
        data = [{"instruction": f"question {i}", "output": f"answer {i} " * 20} for i in range(64)]
        (home / "talks.json").write_text(json.dumps(data))
        (home / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json"}}))
        whole = start(tree, home, steps, cpu)
        last = home / "out" / f"checkpoint-{steps}"
        found = {"saves": whole["saves"][1:], "fresh": whole["first_step"], "bytes": size(last)}
        found["resumed"] = start(tree, home, steps + 1, cpu)["first_step"]
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--other", type=Path, help="the other checkout")
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--runs", type=int, default=2, help="of each tree")
    parser.add_argument("--steps", type=int, default=5, help="saves of a run")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="without its suffix")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.steps, args.cpu)
        return 0
    trees = {"this": HERE.parent}
    if args.other is not None:
        trees = {"other": args.other.resolve(), **trees}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for number in range(args.runs):
        for name, tree in trees.items():
            found[name].append(run(tree, args.shape, args.steps, args.cpu))
            print(number, name, json.dumps(found[name][-1]), flush=True)
    table = render(found, args.shape)
    print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"command": command_line(), "shape": args.shape, "runs": found}
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table)
    return 0


def render(found: dict[str, list[dict[str, Any]]], shape: str) -> str:
    """Medians of each tree, a row each."""
    lines = [
        "# Time and size of a checkpoint",
        "",
        f"{shape}, full parameters, AdamW in fp32. Medians; `other` is the tree before checkpoints"
        " had a manifest.",
        "",
        "| tree | save s | size GB | first step s, from the beginning | from a checkpoint |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        saves = [s for r in runs for s in r["saves"]]
        fresh = statistics.median(r["fresh"] for r in runs)
        resumed = statistics.median(r["resumed"] for r in runs)
        lines.append(
            f"| {name} | {statistics.median(saves):.2f} ({min(saves):.2f} to {max(saves):.2f}) |"
            f" {runs[-1]['bytes'] / GB:.3f} | {fresh:.1f} | {resumed:.1f} |"
        )
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers"))
    return "\n".join([*lines, "", f"`{command_line()}` ({machine_name()}, {versions})", ""])


if __name__ == "__main__":
    raise SystemExit(main())
