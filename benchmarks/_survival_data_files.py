"""Damaged and odd data files: rows with odd values in every format and file type, damaged bytes, and
odd entries of dataset_info.json.

Two kinds of cases. `files`: fifty data sets, read and tokenised in this process as a run reads
them, or as a stream. `run`: one as the command `train`, in a forked process.

What is specified: samples (each of which can be read), with the bad rows counted; or a sentence.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

from _survival_values import RUN, SENTENCES, base, limit_of, run_command, write_inputs

EACH = 50
"""Data sets of a `files` case."""
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 2.5, 1e300, "", " ", "null", "x" * 5000, "<think>", "</think>a",
    "<|im_end|>", "\0", "\ufeff", "\u202e", "{{content}}", "[", "{}", [], [None], [[]], {}, {"a": 1},
    [{"role": "user"}], [{"role": None, "content": None}], [{"from": "human", "value": 3}],
    [{"role": "assistant", "content": "a"}], '[{"from": "human", "value": "a"}]', {"x": {"y": [1]}},
    [{"name": "f", "arguments": {}}], '{"name": "f"}', 2**63, [1, "a", None], "\n" * 50, "é" * 99,
)  # fmt: skip
ENTRY: dict[str, tuple[Any, ...]] = {
    "file_name": (None, [], ["x.json"], 3, "", " ", {"a": 1}, "absent.json", ".", "..", "/", "a\0b", "x" * 300,
                  True, "../" * 50, "data"),
    "formatting": (None, [], 3, "", "alpaca", "sharegpt", "openai", "ALPACA", {"a": 1}),
    "ranking": (None, [], 1, "true", True, False),
    "columns": (None, [], 3, "", {}, {"prompt": None}, {"prompt": []}, {"prompt": 3}, {"prompt": {"a": 1}},
                {"messages": "messages"}, {"prompt": "instruction", "response": "instruction"},
                {"nonsense": "x"}, {"prompt": "instruction", "history": "output"}, {"kto_tag": "output"}),
    "tags": (None, [], 3, {}, {"role_tag": None}, {"role_tag": []}, {"role_tag": 3}, {"user_tag": "gpt"}),
    "num_samples": (None, 0, -1, 2.5, "3", [], 1, 10**30, True),
    "split": (None, [], 3, "absent"),
    "subset": (None, [], 3),
    "folder": (None, [], 3),
    "hf_hub_url": (None, [], 3, "", {}, "../x", "a b"),
    "cloud_file_name": (None, [], 3, "", "nowhere://x", "s3://", "://", "file:///absent/x.json"),
    "openai_quirks": (None, 1, "x", True),
    "script_url": ("x.py",),
    "ms_hub_url": ("a/b",),
}  # fmt: skip
INFO = (
    "",
    "{",
    "[]",
    "null",
    "3",
    '"x"',
    "\ufeff{}",
    "{}",
    '{"d": null}',
    '{"d": []}',
    '{"d": 3}',
    '{"d": "x.json"}',
)
KINDS = ("json", "jsonl", "csv", "parquet", "arrow", "feather", "txt")
STAGES = ("sft", "sft", "sft", "pt", "dpo", "rm", "kto")
LIMIT = 60.0


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"kind": "run" if number % 2 else "files", "seed": seed, "number": number}


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    draw = random.Random(f"{case['seed']} {case['number']}")
    if case["kind"] == "run":
        return run_run(draw, home)
    begun, bad, ends = time.monotonic(), [], {"read": 0, "refused": 0}
    tokenizer = make_tokenizer(home)
    before = os.environ.get("LONGFACTORY_CACHE")
    os.environ["LONGFACTORY_CACHE"] = str(home / "cache")
    try:
        for trial in range(EACH):
            folder = home / str(trial)
            what, stage = write_data(draw, folder)
            problem, read = read_one(draw, folder, stage, tokenizer)
            ends["read" if read else "refused"] += 1
            if problem:
                bad.append(f"{what}: {problem}")
    finally:
        if before is None:
            del os.environ["LONGFACTORY_CACHE"]
        else:
            os.environ["LONGFACTORY_CACHE"] = before
    end = bad[0] if bad else f"{ends['read']} of {EACH} read, the others refused"
    return {
        "ok": not bad,
        "seconds": time.monotonic() - begun,
        "limit": LIMIT,
        "end": end,
        "trials": EACH,
        "group": "files",
    }


def make_tokenizer(home: Path) -> Any:
    from transformers import AutoTokenizer

    from small_runs import write_tokenizer

    (home / "tokenizer").mkdir(exist_ok=True)
    write_tokenizer(home / "tokenizer")
    return AutoTokenizer.from_pretrained(home / "tokenizer")


# ---- data ----------------------------------------------------------------------------------------


def rows_of(form: str, stage: str, draw: random.Random) -> tuple[dict[str, Any], list[dict]]:
    """The entry of dataset_info.json and good rows of a format."""
    words = ["a", "bc d", "Efg?", "ünï", "1 2 3"]

    def text() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, 8)))

    def talk(role: str, said: str, user: str, answer: str, pairs: int) -> list[dict[str, Any]]:
        return [{role: user if i % 2 == 0 else answer, said: text()} for i in range(2 * pairs)]

    count = draw.randint(1, 12)
    if stage == "pt":
        return {"columns": {"prompt": "text"}}, [{"text": text()} for _ in range(count)]
    if form == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        rows = [{"instruction": text(), "input": text(), "output": text()} for _ in range(count)]
        if draw.random() < 0.3:
            columns["history"] = "history"
            rows = [r | {"history": [[text(), text()]]} for r in rows]
        answer: Callable[[], Any] = text
    else:
        names = ("from", "value", "human", "gpt")
        if form == "openai":
            names = ("role", "content", "user", "assistant")
        columns = {"messages": "messages"}
        rows = [{"messages": talk(*names, draw.randint(1, 3))} for _ in range(count)]

        def answer() -> Any:
            return {names[0]: names[3], names[1]: text()}

    entry: dict[str, Any] = {"formatting": form, "columns": columns}
    if stage in ("dpo", "rm"):
        entry["ranking"] = True
        columns |= {"chosen": "chosen", "rejected": "rejected"}
        rows = [r | {"chosen": answer(), "rejected": answer()} for r in rows]
        for row in rows:
            if "messages" in row:
                row["messages"] = row["messages"][:-1]
    if stage == "kto":
        columns["kto_tag"] = "label"
        rows = [r | {"label": draw.random() < 0.5} for r in rows]
    if draw.random() < 0.3:
        columns["system"] = "system"
        rows = [r | {"system": text()} for r in rows]
    if draw.random() < 0.2:
        columns["tools"] = "tools"
        rows = [r | {"tools": json.dumps([{"name": "f", "parameters": {}}])} for r in rows]
    return entry, rows


def spoil(row: Any, draw: random.Random, depth: int = 0) -> Any:
    """The row with one value, at any depth, replaced, removed, repeated or added."""
    if isinstance(row, dict) and row:
        key = draw.choice(list(row))
        if draw.random() < 0.5 and depth < 3 and isinstance(row[key], (dict, list)):
            return row | {key: spoil(row[key], draw, depth + 1)}
        how = draw.random()
        if how < 0.15:
            return {k: v for k, v in row.items() if k != key}
        if how < 0.25:
            return row | {
                draw.choice(
                    ["tool_calls", "content", "x", "weight", "images", "role"]
                ): draw.choice(ODD)
            }
        return row | {key: draw.choice(ODD)}
    if isinstance(row, list) and row:
        i = draw.randrange(len(row))
        how = draw.random()
        if how < 0.5:
            return [*row[:i], spoil(row[i], draw, depth + 1), *row[i + 1 :]]
        if how < 0.7:
            return row[:i] + row[i + 1 :]
        if how < 0.85:
            return [*row[:i], row[i], *row[i:]]
        return [*row[:i], draw.choice(ODD), *row[i + 1 :]]
    return draw.choice(ODD)


def write_rows(path: Path, kind: str, rows: list[Any]) -> str:
    """Writes rows as a file of a kind, as JSON Lines where it cannot hold them. Returns its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind in ("parquet", "arrow", "feather"):
        try:
            table = pa.Table.from_pylist(rows)
            path = path.with_suffix(".parquet" if kind == "parquet" else ".arrow")
            if kind == "parquet":
                pq.write_table(table, path)
            elif kind == "arrow":
                with pa.ipc.new_stream(path, table.schema) as writer:
                    writer.write_table(table)
            else:
                with pa.ipc.new_file(path, table.schema) as writer:
                    writer.write_table(table)
            return path.name
        except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
            kind = "jsonl"
    if kind == "csv":
        import csv

        path = path.with_suffix(".csv")
        names = list(dict.fromkeys(k for row in rows if isinstance(row, dict) for k in row)) or [
            "x"
        ]
        with path.open("w", newline="", encoding="utf-8", errors="replace") as f:
            writer = csv.DictWriter(f, names, extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                if isinstance(row, dict):
                    flat = {
                        k: json.dumps(v) if isinstance(v, (list, dict)) else v
                        for k, v in row.items()
                    }
                    writer.writerow(flat)
        return path.name
    path = path.with_suffix(f".{kind}")
    if kind == "txt":
        path.write_text("\n".join(str(r) for r in rows), encoding="utf-8", errors="replace")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path.name


def damage(path: Path, draw: random.Random) -> str:
    """Damages a file's bytes; says how."""
    data = path.read_bytes()
    how = draw.choice(
        ["truncated", "flipped", "flipped", "empty", "inserted", "removed", "head", "doubled"]
    )
    at = draw.randrange(len(data) + 1)
    if how == "truncated":
        data = data[:at]
    elif how == "empty":
        data = b""
    elif how == "inserted":
        data = data[:at] + draw.randbytes(draw.randint(1, 40)) + data[at:]
    elif how == "removed":
        data = data[:at] + data[at + draw.randint(1, 40) :]
    elif how == "head":
        data = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x1f\x8b", b"["]) + data
    elif how == "doubled":
        data += data
    elif data:
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 5, 50])):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        data = bytes(changed)
    path.write_bytes(data)
    return how


def write_data(draw: random.Random, folder: Path) -> tuple[str, str]:
    """A data set `d` with its dataset_info.json. Returns how it was made, and the stage."""
    folder.mkdir()
    stage = draw.choice(STAGES)
    form, kind = draw.choice(["alpaca", "sharegpt", "openai"]), draw.choice(KINDS)
    entry, rows = rows_of(form, stage, draw)
    notes = [stage, form, kind]
    if draw.random() < 0.6:
        for _ in range(draw.randint(1, 4)):
            i = draw.randrange(len(rows))
            rows[i] = spoil(rows[i], draw)
            if not isinstance(rows[i], dict) and draw.random() < 0.8:
                rows[i] = {"instruction": rows[i]}
    name = write_rows(folder / "d", kind, rows)
    if draw.random() < 0.4:
        notes.append(damage(folder / name, draw))
    entry["file_name"] = name
    if draw.random() < 0.25:
        key = draw.choice(list(ENTRY))
        entry[key] = draw.choice(ENTRY[key])
        notes.append(f"{key}: {entry[key]!r}"[:80])
        if key in ("hf_hub_url", "cloud_file_name"):
            entry.pop("file_name")
    text = json.dumps({"d": entry})
    if draw.random() < 0.03:
        text = draw.choice(INFO)
        notes.append(f"dataset_info: {text!r}")
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    return ", ".join(notes), stage


# ---- reading -------------------------------------------------------------------------------------


def read_one(
    draw: random.Random, folder: Path, stage: str, tokenizer: Any
) -> tuple[str | None, bool]:
    """Reads a data set as a run does. Returns what is wrong with how that ended, and whether there
    were samples.
    """
    from longfactory.config import from_mapping
    from longfactory.data.module import load_datasets
    from longfactory.data.templates import get_template
    from longfactory.errors import DataError

    given = base(folder) | {"dataset": "d", "stage": stage, "cutoff_len": 128}
    given["dataset"] = draw.choice(["d"] * 9 + ["d.json"])
    if draw.random() < 0.2:
        given |= {"streaming": True, "max_steps": 1, "buffer_size": 3}
    given["on_bad_row"] = draw.choice(["skip", "skip", "error"])
    given["packing"] = draw.choice([None, stage in ("sft", "pt")])
    options: SimpleNamespace = from_mapping(given).data_options()
    log = logging.getLogger("survival")
    log.propagate = False
    log.setLevel(logging.CRITICAL)
    logging.getLogger("longfactory").setLevel(logging.CRITICAL)
    try:
        with limit_of(20):
            template = get_template(options, tokenizer, log)
            train = load_datasets(
                options, stage=stage, tokenizer=tokenizer, template=template, seed=0, log=log
            ).train
            assert train is not None
            samples = list(islice(train, 20))
            if not samples or not all(len(d.input_ids) for s in samples for d in s):
                return "there are no samples, and nothing is said", True
    except DataError as error:
        told = " ".join(str(error).split())
        if len(told) < 15 or len(told) > 3000:
            return f"refused in {len(told)} characters: {told[:80]}", False
        return None, False
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"{type(error).__name__} at {place}: {str(error)[:200]}", False
    return None, True


def run_run(draw: random.Random, home: Path) -> dict[str, Any]:
    """One data set as the command."""
    write_inputs(home)
    what, stage = write_data(draw, home / "data")
    given = base(home) | RUN | {"dataset_dir": str(home / "data"), "dataset": "d", "stage": stage}
    status, seconds, output = run_command(given, home, LIMIT)
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line[line.index("longfactory: ") :] for line in lines if "longfactory: " in line]
    traced = "Traceback (most recent call last)" in output
    return {
        "ok": (status == 0 and not traced) or (status in SENTENCES and bool(told)),
        "seconds": seconds,
        "limit": LIMIT,
        "end": f"{what}: status {status}: {(told or lines or [''])[-1][:300]}",
        "group": "run",
    }
