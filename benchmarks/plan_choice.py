"""Whether `memory: auto` takes the fastest way: each setting as it chooses, and with the memory keys
set otherwise by hand, through `longfactory train` on one GPU each.

    python benchmarks/plan_choice.py --out benchmarks/results
    python benchmarks/plan_choice.py --check --kind H200   # no GPU: what would be run

Beside what `auto` chose run all other ways that `longfactory plan` says fit and are at most
`--slower` times slower; those that it says are slower, do not fit, or are the chosen one again, are
in the table as such and do not run. Seconds are the mean of the steps after the first; runs of one
setting follow one another on one GPU, settings run side by side where there are more.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import queue
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _table import command_line, machine_name  # noqa: E402
from plan_accuracy import SETTINGS, planned, run  # noqa: E402

CHOSEN = (
    "1.5b-full-16k",
    "1.5b-full-64k",
    "7b-lora-32k",
    "14b-8-layers-full-32k",
    "moe-6-layers-full-16k",
    "gemma-12-layers-full-32k",
)
CHECKPOINTED: dict[str, Any] = {"disable_gradient_checkpointing": "false"}
SAVED = CHECKPOINTED | {"keep_attention": "1.0"}
WAYS: dict[str, dict[str, Any]] = {
    "every activation stored": {"disable_gradient_checkpointing": "true"},
    "attention outputs saved": SAVED | {"offload_activations": "false", "mlp_chunk": 0},
    "attention outputs saved, offloaded": SAVED | {"offload_activations": "true"},
    "attention outputs saved, chunks of 8,192": SAVED | {"mlp_chunk": 8192},
    "attention recomputed": CHECKPOINTED
    | {"keep_attention": "0.0", "offload_activations": "false", "mlp_chunk": 0},
    "memory: fast": {"memory": "fast"},
    "memory: long": {"memory": "long"},
    "optimizer on the host": {"optimizer_placement": "host"},
}


def prediction(name: str, home: Path, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step and settings that `longfactory plan` gives; `error`: why there are none."""
    at = SETTINGS[name]
    found = planned(name, at._replace(keys=at.keys | extra), 1, home, kind)
    settings = re.search(r"Memory plan.*\n +(.*)", found["text"])
    seconds = re.search(r"predicted: ([0-9.]+) s a row", found["text"])
    if found["rc"] not in (0, 3) or settings is None or seconds is None:
        lines = [line for line in found["text"].splitlines() if line.strip()]
        why = "does not fit" if found["rc"] == 1 else "refused: " + lines[-1][:200]
        return {"error": why}
    masters = re.search(r"masters: (\w+)", found["text"])
    return {
        "planned_seconds": float(seconds[1]),
        "settings": settings[1] + (f"; masters: {masters[1]}" if masters else ""),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | way | planned s | step s | peak GiB | over the fastest |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        best = min((r["step_seconds"] for r in mine if "step_seconds" in r), default=None)
        for r in mine:
            plan = f"{r['planned_seconds']:.2f}" if "planned_seconds" in r else ""
            if "step_seconds" not in r:
                lines.append(f"| {name} | {r['way']} | {plan} | {r.get('error', '')} | | |")
                continue
            lines.append(
                f"| {name} | {r['way']} | {plan} | {r['step_seconds']:.3f} | {r['peak_gib']:.1f} |"
                f" {r['step_seconds'] / best:.3f} |"
            )
    return "\n".join(lines) + "\n"


def ways_of(name: str, home: Path, kind: str, slower: float) -> list[dict[str, Any]]:
    """The chosen way and the others, with `run: True` where they are to be measured."""
    auto = {"name": name, "way": "auto", "keys": {}, **prediction(name, home, kind, {})}
    rows = [{**auto, "run": True}]
    seen = {auto.get("settings")}
    for way, keys in WAYS.items():
        row = {"name": name, "way": way, "keys": keys, **prediction(name, home, kind, keys)}
        if "error" not in row:
            if row["settings"] in seen:
                row["error"] = "the same settings as above"
            elif row["planned_seconds"] > slower * auto.get("planned_seconds", float("inf")):
                row["error"] = "not run"
        seen.add(row.get("settings"))
        rows.append({**row, "run": "error" not in row})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(CHOSEN))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--slower", type=float, default=1.6)
    parser.add_argument("--limit", type=float, default=240, help="no run begins later")
    parser.add_argument("--kind", default=None, help="of GPU, for the plan")
    parser.add_argument("--check", action="store_true", help="plan every way, run none")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    import torch
    import transformers

    kind = a.kind or machine_name().split()[0]
    end = time.time() + a.limit
    free: queue.Queue[str] = queue.Queue()
    count = max(1, torch.cuda.device_count())
    for device in range(count):
        free.put(str(device))
    about = {
        "machine": machine_name(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }

    def one(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        name, device = rows[0]["name"], free.get()
        try:
            for number, row in enumerate(rows):
                if not row["run"]:
                    continue
                if time.time() > end:
                    row["error"] = "not started: the time of this command was up"
                    continue
                at = SETTINGS[name]
                at = at._replace(keys=at.keys | row["keys"])
                found = run(f"{name}-{number}", at, 1, a.steps, home, device, limit=120)
                if "error" in found:
                    row["error"] = f"failed: {found['error']}"
                else:
                    row |= {key: found[key] for key in ("step_seconds", "peak_gib")}
                print(json.dumps({**row, "keys": None}), flush=True)
        finally:
            free.put(device)
        return rows

    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(max(count, (os.cpu_count() or 2) // 2)) as planners,
        concurrent.futures.ThreadPoolExecutor(count) as runners,
    ):
        home = Path(folder)
        ways = planners.map(lambda name: ways_of(name, home, kind, a.slower), a.only)
        groups = list(ways) if a.check else list(runners.map(one, list(ways)))
    rows = [row for group in groups for row in group]
    text = "# What memory: auto chooses, beside other ways\n\n" + table(rows)
    made = f"\n`{about['command']}` ({about['date']}, {about['machine']}, {about['versions']})\n"
    print(text + made)
    if a.out is not None and not a.check:
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / "plan_choice.json").write_text(
            json.dumps({**about, "rows": rows}, indent=1) + "\n"
        )
        (a.out / "plan_choice.md").write_text(text + made)
    return int(any("step_seconds" not in r for r in rows if r["run"] and not a.check))


if __name__ == "__main__":
    raise SystemExit(main())
