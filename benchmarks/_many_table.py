"""The tables of `many_gpus.py`: rows that are printed as they end, kept beside those of earlier
commands, and written again from a log.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from _table import command_line, machine_name

Row = dict[str, Any]
K = 1024


def keep(a: argparse.Namespace, row: Row, rows: list[Row]) -> None:
    """Adds a row, prints it, and writes the table of the part anew. A row of the same name that was
    measured by an earlier command gives way.
    """
    made = about(a)
    print(json.dumps(row), flush=True)
    rows[:] = [r for r in rows if r["row"] != row["row"]] + [{**row, "made": made}]
    write(a, rows)


def write(a: argparse.Namespace, rows: list[Row]) -> None:
    """The table of a part, where there is a folder for it; with the remarks that somebody wrote into
    its .json.
    """
    if a.out is None:
        return
    path = stem(a)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.with_suffix(".json").read_text()) if earlier(a) else {}
    remarks = before.get("remarks", [])
    whole = {"part": a.part, "rows": rows} | ({"remarks": remarks} if remarks else {})
    text = json.dumps(whole, indent=1) + "\n"
    path.with_suffix(".json").write_text(text)
    made = dict.fromkeys(
        f"`{m['command']}` ({m['date']}, {m['machine']}, {m['versions']})"
        for m in (r["made"] for r in rows)
    )
    parts = [f"# {a.title}", table(rows), *a.notes, "\n".join(made), *remarks]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


_ABOUT: Row = {}


def about(a: argparse.Namespace) -> Row:
    """The machine, the command, the day and the versions; printed once."""
    import transformers

    if not _ABOUT:
        _ABOUT.update(
            machine=f"{a.gpus} x {machine_name() if not a.smoke else 'CPU process'}",
            command=re.sub(r" --after \S+", "", command_line()),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        )
        print("ABOUT " + json.dumps(_ABOUT), flush=True)
    return dict(_ABOUT)


def from_log(a: argparse.Namespace) -> int:
    """The table of a part from what commands printed whose files are elsewhere; other parts' rows in
    the same log are passed over.
    """
    found: list[Row] = []
    made: Row = {}
    for line in a.log.read_text().splitlines():
        if line.startswith("ABOUT "):
            made = json.loads(line[6:])
        elif line.startswith('{"row": ') and f"--part {a.part} " in made["command"] + " ":
            found.append({**json.loads(line), "made": made})
    if not found:
        raise SystemExit(f"{a.log} holds no row of the part {a.part}.")
    _ABOUT.update(found[-1]["made"])
    names = [row["row"] for row in found]
    rows = [row for row in earlier(a) if row["row"] not in names]
    # a row that was printed again, with more in it, counts in its first place
    write(a, rows + [found[len(names) - 1 - names[::-1].index(n)] for n in dict.fromkeys(names)])
    return 0


def stem(a: argparse.Namespace) -> Path:
    """Where a part's results go, without the suffix."""
    gpu = "CPU" if a.smoke else (_ABOUT.get("machine") or about(a)["machine"]).split()[2]
    return Path(a.out) / f"many_gpus_{a.part}_{a.gpus}x{gpu}"


def earlier(a: argparse.Namespace) -> list[Row]:
    """Rows that earlier commands measured."""
    if a.out is None or not stem(a).with_suffix(".json").is_file():
        return []
    found: list[Row] = json.loads(stem(a).with_suffix(".json").read_text())["rows"]
    return found


HIDDEN = ("made", "losses", "schedule")
"""Of a row, what its table does not show."""


def table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(k for r in rows for k in r if k not in HIDDEN))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        lines.append("| " + " | ".join(cell(r.get(c, "")) for c in columns) + " |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def wanted(a: argparse.Namespace, name: str) -> bool:
    return a.only is None or any(word in name for word in a.only)
