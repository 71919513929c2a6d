"""Odd values for keys: every key with every odd value, random configurations, and some of these as
whole runs.

Three kinds of cases. `key`: one key with each of `ODD`, read as a run's configuration in this
process. `random`: a hundred configurations with several odd keys. `run`: one of these as the
command `train`, with a tiny model and one step, in a process forked from this one (which has
imported everything). The keys come first; then two runs for each hundred of configurations.

What is specified: a configuration is read and, written out, read again as the same; or it is
refused in a sentence. No number beyond all ranges is read, no secret is shown, nothing takes long.
A run ends with 0, or with a sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

DIGITS = "9" * 400
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-30, 1e30, -1e30, float("inf"), float("-inf"),
    float("nan"), 2**31, 2**63, 10**400, -(10**400), 0.999999, "", " ", "null", "inf", "nan", "1e30",
    DIGITS, "-" + DIGITS, "9" * 5000, "auto", "no", "1,2", "a/../b", "x" * 300, "y/" * 3000,
    "nul\0byte", "\ud800", "\n", [], [None], [[1]], {}, {"a": float("nan")}, "{", "${oc.env:HOME}",
)  # fmt: skip
"""Beside what a person writes: nothing, too much, another type, no text."""

NO_NUMBERS = ("inf", "nan", "1e30", DIGITS, "-" + DIGITS, "9" * 5000)
TOKEN = "hf_SurvivalSecret0123456789"
EACH = 100
"""Configurations of a `random` case."""


def numeric(key: Any) -> bool:
    """Whether a key's values are numbers."""
    kinds = _kinds(key.kind)
    return int in kinds or float in kinds


def beyond_all_ranges(value: Any) -> bool:
    """A number that no key's range holds, or its text."""
    if isinstance(value, str):
        return value in NO_NUMBERS
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**62


def all_keys() -> dict[str, Any]:
    """Every key that is an argument, by name."""
    from longfactory.config.trainer_keys import TRAINER_KEYS
    from longfactory.config.translate import OWN_KEYS, TURNED

    return OWN_KEYS | TRAINER_KEYS | TURNED


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    names = sorted(all_keys())
    for number in range(count):
        if number < len(names):
            yield {"kind": "key", "key": names[number]}
        elif (number - len(names)) % 3 == 0:
            yield {"kind": "random", "seed": seed, "number": number}
        else:
            yield {"kind": "run", "seed": seed, "number": number}


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    if case["kind"] == "run":
        return run_run(case, home)
    from transformers import Seq2SeqTrainingArguments  # noqa: F401  before the time is taken

    begun, bad, trials, refused = time.monotonic(), [], 0, 0
    for given in configurations(case, home):
        trials += 1
        problem, was_refused = read_one(given, home)
        refused += was_refused
        if problem:
            bad.append(problem)
    end = bad[0] if bad else f"{refused} of {trials} refused, the others read"
    seconds = time.monotonic() - begun
    limit = 60.0
    return {
        "ok": not bad,
        "seconds": seconds,
        "limit": limit,
        "end": end,
        "trials": trials,
        "group": case["kind"],
    }


def base(home: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(home / "model"),
        "dataset": "talks",
        "dataset_dir": str(home),
        "template": "chatml",
        "output_dir": str(home / "out"),
        "use_cpu": True,
    }


def configurations(case: dict[str, Any], home: Path) -> Iterator[dict[str, Any]]:
    """The keys and values of a case."""
    if case["kind"] == "key":
        for value in ODD:
            yield base(home) | {case["key"]: value}
        return
    draw = random.Random(f"{case['seed']} {case['number']}")
    for _ in range(EACH):
        yield base(home) | random_keys(draw)


def random_keys(draw: random.Random) -> dict[str, Any]:
    """One to five keys with values that are odd or usual."""
    keys = all_keys()
    names = draw.sample(sorted(keys), draw.randint(1, 5))
    return {
        name: draw.choice(ODD) if draw.random() < 0.4 else usual(keys[name], draw) for name in names
    }


def usual(key: Any, draw: random.Random) -> Any:
    """A value of the key's own type, in or near its range."""
    kinds = [k for k in _kinds(key.kind) if k is not type(None)]
    choices = [c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)]
    if choices and draw.random() < 0.9:
        return draw.choice(choices)
    if bool in kinds and draw.random() < 0.8:
        return draw.random() < 0.5
    if int in kinds or float in kinds:
        ends = [n for n in (key.low, key.high, key.above, key.below) if n is not None]
        value = draw.choice([*ends, 1, 2, draw.random(), draw.randint(-3, 30)])
        return value if float in kinds else int(value)
    return draw.choice(["a", "a,b", "x/y", key.default])


def _kinds(kind: Any) -> list[Any]:
    """The types that a key takes: of a union each, of a tuple that of its members."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return [k for member in typing.get_args(kind) for k in _kinds(member)]
    return _kinds(typing.get_args(kind)[0]) if origin is tuple else [kind]


def read_one(given: dict[str, Any], home: Path) -> tuple[str | None, bool]:
    """Reads a configuration.

    Returns:
        What is wrong with how it ended, or None; and whether it was refused.
    """
    from longfactory.config import from_mapping, resolved
    from longfactory.config.read import read_file
    from longfactory.errors import ConfigError

    what = repr({k: v for k, v in given.items() if k not in base(home) or v != base(home)[k]})[:200]
    begun = time.process_time()
    try:
        with limit_of(30):
            cfg = from_mapping(given | {"hub_token": given.get("hub_token", TOKEN)})
            text = resolved(cfg)
            cfg.training_arguments(use_cpu=True)
            if TOKEN in text or TOKEN in repr(cfg):
                return f"{what}: the token is written", False
            (home / "again.yaml").write_text(text)
            again = from_mapping(read_file(home / "again.yaml"))
            if resolved(again) != text:
                return f"{what}: what is written is read as another run", False
    except ConfigError as error:
        told = str(error)
        if TOKEN in told:
            return f"{what}: the token is shown", True
        if len(told) < 15 or max(map(len, told.splitlines())) > 1500:
            return f"{what}: refused in {len(told)} characters: {told[:100]!r}", True
        return None, True
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}", False
    if time.process_time() - begun > 3:
        return f"{what}: took {time.process_time() - begun:.1f} s of this process", False
    keys = all_keys()
    for name, value in given.items():
        if numeric(keys[name]) and beyond_all_ranges(value):
            return f"{what}: {name} was read", False
    return None, False


@contextlib.contextmanager
def limit_of(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- whole runs ----------------------------------------------------------------------------------

LIMIT = 120.0
SENTENCES = (2, 75, 76, 77)
"""Statuses that come with a sentence: docs/stopping.md."""
RUN = {
    "max_steps": 1,
    "do_train": True,
    "cutoff_len": 64,
    "per_device_train_batch_size": 1,
    "lora_rank": 2,
    "save_strategy": "no",
    "report_to": "none",
    "optim": "adamw_torch",
    "preprocessing_num_workers": 1,
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"dataset": "talks"},
    "pt": {"dataset": "texts", "template": None},
    "dpo": {"dataset": "pairs"},
    "rm": {"dataset": "pairs"},
    "kto": {"dataset": "labels"},
}
UNBOUNDED = ("max_steps", "num_train_epochs", "nproc_per_node", "dataloader_num_workers")
"""Keys whose large values are runs without end, or more processes than a machine has room for."""


def write_inputs(home: Path) -> None:
    """A tiny model and a few samples for each stage."""
    from small_runs import text, write_model

    random.seed(0)
    write_model(home / "model", 0)
    columns = {"prompt": "p", "response": "r"}
    rows: dict[str, tuple[dict[str, Any], Any]] = {
        "talks": ({}, lambda i: {"instruction": text(12 + i), "output": text(25 - i)}),
        "texts": ({"columns": {"prompt": "p"}}, lambda i: {"p": text(20 + i)}),
        "pairs": (
            {"ranking": True, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}},
            lambda i: {"p": text(9), "c": text(5 + i), "r": text(20 - i)},
        ),
        "labels": (
            {"columns": {**columns, "kto_tag": "k"}},
            lambda i: {"p": text(9), "r": text(9 + i), "k": bool(i % 2)},
        ),
    }
    info = {}
    for name, (entry, row) in rows.items():
        (home / f"{name}.json").write_text(json.dumps([row(i) for i in range(8)]))
        info[name] = {"file_name": f"{name}.json", **entry}
    (home / "dataset_info.json").write_text(json.dumps(info))


def draw_run(draw: random.Random, home: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a run, and those of them that are drawn. Three of four runs are ones whose
    configuration is read, so that what comes after it is seen too.
    """
    from longfactory.config import ConfigError, from_mapping

    reads = draw.random() < 0.75
    while True:
        odd = {k: v for k, v in random_keys(draw).items() if k not in UNBOUNDED or is_odd(v)}
        stage = draw.choice(list(STAGES))
        kind = {"finetuning_type": draw.choice(["lora", "full", "freeze"])}
        given = base(home) | RUN | {"stage": stage} | kind | STAGES[stage] | odd
        try:
            from_mapping(given)
        except ConfigError:
            if reads:
                continue
        return given, {"stage": stage, **kind, **odd}


def run_run(case: dict[str, Any], home: Path) -> dict[str, Any]:
    """One configuration as the command."""
    write_inputs(home)
    given, odd = draw_run(random.Random(f"run {case['seed']} {case['number']}"), home)
    status, seconds, output = run_command(given, home, LIMIT)
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line[line.index("longfactory: ") :] for line in lines if "longfactory: " in line]
    traced = "Traceback (most recent call last)" in output
    ok = (status == 0 and not traced) or (status in SENTENCES and bool(told))
    last = (told or lines or [""])[0 if told else -1]
    return {
        "ok": ok,
        "seconds": seconds,
        "limit": LIMIT,
        "end": f"{repr(odd)[:300]}: status {status}: {last[:300]}",
        "group": "run",
    }


def is_odd(value: Any) -> bool:
    return beyond_all_ranges(value) or value is None or isinstance(value, (list, dict))


def run_command(
    given: dict[str, Any], home: Path, limit: float, cache: Path | None = None
) -> tuple[int, float, str]:
    """`longfactory train` with these keys in a forked process. Returns its status (-9 where it was
    ended for taking longer than `limit` seconds), the seconds and what it wrote.
    """
    import transformers  # noqa: F401  imported once, here

    import longfactory.train.run  # noqa: F401

    (home / "run.json").write_text(json.dumps(given, default=str))
    begun = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # whoever started this may have put files of its own in their place
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ["LONGFACTORY_CACHE"] = str(cache or home / "cache")
            os.environ["HF_HUB_OFFLINE"] = "1"
            os.chdir(home)
            from longfactory import cli

            status = cli.main(["train", str(home / "run.json")])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = -9
    while time.monotonic() - begun < limit:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.02)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = (home / "log").read_text(errors="replace") if (home / "log").exists() else ""
    return status, time.monotonic() - begun, re.sub(r"\x1b\[[0-9;]*m", "", text)
