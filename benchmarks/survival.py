"""Kills, signals, hangs, damaged files and odd values: how runs of the command end.

    python benchmarks/survival.py --part kills --seed 1 --count 20
    python benchmarks/survival.py --part damaged --part resumed --count 40
    python benchmarks/survival.py --render           # the report alone, from what was recorded

Each part is a module `_survival_PART.py` beside this file. It makes cases from a seed, each fully
described by plain JSON values, runs one in a folder of its own, and says whether it ended as
specified and within its stated time. A case may hold many cheap trials (a hundred configurations);
its number of trials is then in the result (`trials`). Every case that has run is one line of `survival.jsonl` under
`--out`, written when the case ends; the same command goes on where it stopped, so that a long part
can be run in several sittings. `survival.md` is the report of the whole file. A case whose code has
changed since is run again with `--again`; `--again failed` takes those that did not end as specified.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "src"))

PARTS = {
    "kills": "SIGKILL of a rank, the process tree or the launcher, then the same command",
    "damaged": "one file of the last checkpoint truncated, flipped, missing or empty, then resume",
    "resumed": "a key, the data or the processes changed between a run and its continuation",
    "signals": "SIGTERM, SIGINT, SIGUSR1 to the launcher, the group or a rank",
    "restarts": "a rank killed with MAX_RESTARTS set",
    "stopped": "a rank stopped or missing, in every phase",
    "unequal": "ranks with other configurations, data, code or versions",
    "nodes": "several hosts: cut off, slowed, killed",
    "numbers": "NaN, Inf and spikes in losses, gradients and weights",
    "values": "odd values for keys",
    "data_files": "damaged and odd data files",
    "disks": "full, read-only and impossible disks",
    "gpus": "kills, signals, stopped ranks and a long save on two GPUs",
    "soak": "hours of training: memory, handles, the log",
}


class Part(Protocol):
    """What a module `_survival_PART.py` defines."""

    def cases(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """`count` cases as plain JSON values, the same for the same seed."""

    def run_case(self, case: dict[str, Any], home: Path) -> dict[str, Any]:
        """Runs one in the empty folder `home`.

        Returns:
            ok: whether it ended as specified; seconds: how long it took; limit: seconds that it
            may take; end: a line on how it ended; and any other numbers of the part.
        """


def load_part(name: str) -> Part:
    return importlib.import_module(f"_survival_{name}")  # type: ignore[return-value]


def read(path: Path) -> list[dict[str, Any]]:
    """The recorded cases; a last line that was cut while it was written is left out."""
    found = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def share(text: str) -> tuple[int, int]:
    """`1/4`: the first of four shares."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share such as 1/4")
    return int(part) - 1, int(parts)


def run_part(
    name: str,
    seed: int,
    count: int,
    path: Path,
    again: str,
    until: float,
    of: tuple[int, int] = (0, 1),
) -> int:
    """Runs the cases of a part that are not recorded yet; `again`: or "failed", or "all" of them.
    `of`: (k, n), the cases k, k + n, k + 2 n, ... Returns how many failed.
    """
    part = load_part(name)
    recorded = [r for r in newest(read(path)) if r["part"] == name]
    done = {
        json.dumps(r["case"], sort_keys=True)
        for r in recorded
        if again == "no" or (again == "failed" and r["ok"])
    }
    failed = 0
    for number, case in enumerate(part.cases(seed, count)):
        if number % of[1] != of[0] or json.dumps(case, sort_keys=True) in done:
            continue
        if time.time() > until:
            print(f"{name}: the time of this command is up after {number} of {count}", flush=True)
            break
        with tempfile.TemporaryDirectory(prefix=f"survival-{name}-") as home:
            begun = time.time()
            try:
                result = part.run_case(case, Path(home))
            except Exception:
                result = {"ok": False, "limit": 0.0, "end": traceback.format_exc(limit=-3)}
            result.setdefault("seconds", time.time() - begun)
        late = result["limit"] and result["seconds"] > result["limit"]
        result["ok"] = bool(result["ok"]) and not late
        result["end"] = str(result["end"]).replace(home, "HOME")  # a folder of this case alone
        failed += not result["ok"]
        record = {"part": name, "seed": seed, "case": case, **result, **about()}
        append(path, record)
        mark = "ok  " if result["ok"] else "FAIL"
        print(f"{mark} {name} {number} {json.dumps(case)}: {result['end']}", flush=True)
    return failed


def about() -> dict[str, Any]:
    """When and with what a case ran."""
    names = ("torch", "transformers", "accelerate", "peft", "datasets")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "versions": {n: metadata.version(n) for n in names if _installed(n)},
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def newest(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each case."""
    found = {(r["part"], json.dumps(r["case"], sort_keys=True)): r for r in records}
    return list(found.values())


def render(records: Sequence[dict[str, Any]]) -> str:
    """The report: a table of parts, then every case that did not end as specified."""
    records = newest(records)
    lines = [
        "# How runs end",
        "",
        "`python benchmarks/survival.py --part PART --seed S --count N`; each case is a line of"
        " `survival.jsonl`.",
        "",
        "| part | what is done | cases | trials | as specified | not | median s | longest s |"
        " commits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, what in PARTS.items():
        rows = [r for r in records if r["part"] == name]
        if not rows:
            lines.append(f"| {name} | {what} | not run | | | | | | |")
            continue
        good = sum(r["ok"] for r in rows)
        seconds = sorted(r["seconds"] for r in rows)
        commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
        lines.append(
            f"| {name} | {what} | {len(rows)} | {sum(r.get('trials', 1) for r in rows):,} | {good} |"
            f" {len(rows) - good} |"
            f" {seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f} | {commits} |"
        )
    for name in PARTS:
        ends = _groups([r for r in records if r["part"] == name and "group" in r])
        if ends:
            lines += ["", f"## {name}", "", "| group | cases | as specified |", "|---|---|---|"]
            lines += [f"| {group} | {n} | {good} |" for group, (n, good) in ends.items()]
    bad = [r for r in records if not r["ok"]]
    if bad:
        lines += ["", "## Not as specified", ""]
        lines += [
            f"- {r['part']} (seed {r['seed']}): `{json.dumps(r['case'])}`:"
            f" {' '.join(str(r['end']).split())[:300]}"
            for r in bad
        ]
    made = dict.fromkeys(
        f"{r['date']}, " + ", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records
    )
    lines += ["", *(f"Run on {platform.system()}, {m}." for m in made)]
    return "\n".join(lines) + "\n"


def _groups(records: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Of records that name a group (`group`): how many, and how many ended as specified."""
    found: dict[str, tuple[int, int]] = {}
    for r in records:
        n, good = found.get(r["group"], (0, 0))
        found[r["group"]] = (n + 1, good + bool(r["ok"]))
    return dict(sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10, help="cases of each part")
    parser.add_argument(
        "--again",
        nargs="?",
        default="no",
        const="all",
        choices=["no", "failed", "all"],
        help="run recorded cases anew: all, or those that failed",
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument(
        "--share",
        type=share,
        default=(0, 1),
        help="of the cases, such as 1/4: for several commands side by side, each with its own --out",
    )
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    path = args.out / "survival.jsonl"
    until = time.time() + args.limit
    failed = sum(
        run_part(p, args.seed, args.count, path, args.again, until, args.share) for p in args.part
    )
    report = render(read(path))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "survival.md").write_text(report)
    print(report)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
