"""One file of the last checkpoint truncated, flipped, missing or empty, then the same command: it
must name the checkpoint and the file, go on from the one before, and end as the uninterrupted run.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _survival_runs as runs

HOW = ("truncated", "flipped", "missing", "empty")
OTHERS = {
    "lora dropout": ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt"),
    "sp2": ("rng_state_0.pth", "rng_state_1.pth", "model.safetensors"),
    "dpo": ("optimizer.pt", "longfactory_state.json"),  # the only checkpoint there is
}
"""Files beside those of the run `sft`, all of which are damaged."""
WITHOUT_MANIFEST = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")
FILES = (
    "trainer_state.json",
    "longfactory_state.json",
    "longfactory_manifest.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
LAST = f"checkpoint-{runs.STEPS}"


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Every file with every damage, in an order that the seed draws."""
    found = [{"run": "sft", "file": f, "how": h, "manifest": True} for f in FILES for h in HOW]
    found += [
        {"run": run, "file": f, "how": h, "manifest": True}
        for run, files in OTHERS.items()
        for f in files
        for h in HOW
    ]
    # not every bit that flips in an old checkpoint can be found
    found += [
        {"run": "sft", "file": f, "how": h, "manifest": False}
        for f in WITHOUT_MANIFEST
        for h in HOW
        if h != "flipped"
    ]
    random.Random(seed).shuffle(found)
    yield from ({**case, "seed": seed} for case in found[:count])


def damage(path: Path, how: str, seed: int) -> None:
    """Truncates, flips a bit of, removes or empties a file."""
    good = path.read_bytes()
    draw = random.Random(seed)
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        at = draw.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :])
    else:
        path.write_bytes(good[: draw.randrange(1, len(good))] if how == "truncated" else b"")


def without_manifests(out: Path) -> None:
    """The checkpoints as they were before they had manifests."""
    (out / "longfactory_run.json").unlink()
    for folder in out.glob("checkpoint-*"):
        (folder / "longfactory_manifest.json").unlink()
        state = json.loads((folder / "longfactory_state.json").read_text())
        for key in ("format", "data"):
            state.pop(key)
        (folder / "longfactory_state.json").write_text(json.dumps(state))


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    """Damages the file in a copy of the uninterrupted run, and runs the command."""
    reference, expected, _, _ = runs.reference(case["run"])
    begun, out = time.monotonic(), home / "out"
    for name in ("out", "cache"):
        if (reference / name).is_dir():  # a stream has no cache
            shutil.copytree(reference / name, home / name)
    runs.unfinish(out)
    if not case["manifest"]:
        without_manifests(out)
    damage(out / LAST / case["file"], case["how"], case["seed"])
    status = runs.run_whole(case["run"], home)
    log = (home / "log").read_text(errors="replace")
    wrong = [] if status == 0 else [f"rc {status}: {' '.join(log.split())[-400:]}"]
    if status == 0:
        wrong = runs.differences(expected, runs.state_of(out))
        if not case["manifest"]:
            # checkpoints before it are still as they were, and the damaged one is replaced
            wrong = [w for w in wrong if LAST in w or "checkpoint" not in w]
    # what has no trainer_state.json was never written to its end: it is left out by its name
    ignored = (case["file"], case["how"]) == ("trainer_state.json", "missing")
    if not ignored and not (f"{LAST} is damaged" in log and case["file"] in log):
        wrong.append("the file is not named")
    if case["run"] == "dpo":
        told = "the run begins anew" in log
    else:
        told = ignored or "is passed over" in log
    if not told:
        wrong.append("the log does not say from where the run goes on")
    return {
        "ok": not wrong,
        "group": f"{case['how']}{'' if case['manifest'] else ', without a manifest'}",
        "seconds": time.monotonic() - begun,
        "limit": 120.0,
        "end": "; ".join(wrong[:5]) or "named, passed over, equal at the end",
    }
