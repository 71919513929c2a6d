"""Whether `memory: auto` takes the fastest way: each setting as it chooses, and with its nearest
competitors, of all combinations that fit by the same cost model.

    python benchmarks/plan_choice.py --share 1/2 --out benchmarks/results   # the first half
    python benchmarks/plan_choice.py --check --kind H200   # no GPU: what would be run

Of the combinations that fit those that do other things are told apart: storing every activation,
recomputing layers, saved attention outputs, where AdamW is, fp32 or split masters; and within these
offloading, chunks, segments, groups of heads. Of each such way the fastest combination by the plan
competes: the `--ways` nearest to the chosen one, at most `--slower` times slower, first of those
that differ in the former, then of the others. The settings of a way are those planned, whatever
keys it would take to ask for them.

Runs are those of `longfactory train` (`train.run.run`), one after the other in one process on one
GPU; where more are visible, a process for each takes its share of the settings. Seconds are the
median of the steps after the first. With `--out` settings that were measured before stay.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _table import command_line, machine_name  # noqa: E402
from plan_accuracy import FULL, LORA, PT, SFT, Setting, keys_of  # noqa: E402

SETTINGS: dict[str, Setting] = {
    "1.5b-full-16k": Setting("qwen2.5-1.5b", None, 16384, PT | FULL),
    "moe-6-layers-full-16k": Setting("qwen3-30b-a3b", 6, 16384, PT | FULL),
    "7b-14-layers-lora-32k": Setting("qwen2.5-7b", 14, 32768, SFT | LORA),
    "gemma-8-layers-full-32k": Setting("gemma-3-12b", 8, 32768, PT | FULL),
    "14b-8-layers-full-32k": Setting("qwen2.5-14b", 8, 32768, PT | FULL),
    "1.5b-14-layers-full-64k": Setting("qwen2.5-1.5b", 14, 65536, SFT | FULL),
    "7b-full-16k": Setting("qwen2.5-7b", None, 16384, PT | FULL),
}
GiB = 2**30


class Combination(NamedTuple):
    """Memory settings and masters, and the seconds of a step that the plan gives them."""

    seconds: float
    settings: Any
    split: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tells this way from those that differ most."""
        s = self.settings
        return s.checkpoint, s.keep_attention > 0, s.optimizer, self.split

    @property
    def does(self) -> tuple[Any, ...]:
        """What tells this way from all that do other things."""
        s = self.settings
        chunked, segments, groups = s.mlp_chunk, s.segment_layers, s.attention_groups
        less = (s.offload != "none", chunked is not None, segments > 1, groups > 1, s.gradients)
        return (*self.kind, *less)


class Plans(NamedTuple):
    """A setting's run, what `auto` chose, and what competes with it, nearest first."""

    cfg: Any
    chosen: Combination
    others: list[Combination]


def plans(name: str, home: Path, steps: int, kind: str | None) -> Plans:
    """What is planned for a setting: on this machine, or for one GPU of a kind."""
    from longfactory.config import load_config
    from longfactory.memory.shapes import machine
    from longfactory.model import load
    from longfactory.train.memory_plan import (
        choose_sharding,
        count_parameters,
        plan_run,
        this_machine,
    )

    steps = min(steps, 3) if SETTINGS[name].tokens > 16384 else steps
    words = [f"{k}={v}" for k, v in keys_of(name, SETTINGS[name], 1, steps, home).items()]
    cfg = load_config(words)
    model_config = load.load_config(cfg.model, cfg.cutoff_len)
    counts = count_parameters(cfg, model_config)
    where = machine(kind, 1, 128 * GiB) if kind else this_machine(cfg, 1, True)
    sharding = choose_sharding(cfg, counts.total, 1, True, where.gpu_bytes)
    memory = plan_run(cfg, model_config, counts, cfg.longest_row, sharding, where)
    if not memory.plan.fits:
        raise SystemExit(f"{name} does not fit {where.gpu_bytes / GiB:.0f} GiB.")
    chosen = Combination(memory.plan.budget.seconds, memory.plan.settings, memory.split)
    every = [*fitting(memory.plan.job, False), *fitting(memory.plan.job, True)]
    if cfg.method.finetuning_type != "full":
        every = [each for each in every if not each.split]
    fastest = {chosen.does: chosen}
    for each in sorted(every, key=lambda each: each.seconds):
        fastest.setdefault(each.does, each)
    return Plans(cfg, chosen, list(fastest.values())[1:])


def nearest(found: Plans, slower: float, ways: int) -> list[Combination]:
    """So many competitors: first the nearest of each kind, then the nearest of all."""
    near = [each for each in found.others if each.seconds <= slower * found.chosen.seconds]
    kinds = {found.chosen.kind: found.chosen}
    for each in near:
        kinds.setdefault(each.kind, each)
    first = list(kinds.values())[1:]
    rest = [each for each in near if each not in first]
    return sorted([*first, *rest][:ways], key=lambda each: each.seconds)


def with_masters(job: Any, split: bool) -> Any:
    """The job with fp32 or split masters (as `memory.choose.choose_masters` makes them)."""
    if split:
        return dataclasses.replace(job, master=2, leavable=job.sharded or job.machine.gpus == 1)
    return dataclasses.replace(job, master=4, leavable=job.leavable and not job.shape.trainable)


def fitting(job: Any, split: bool) -> Iterator[Combination]:
    """All combinations that the plan enumerates and says fit."""
    from longfactory.memory.budget import budget, fits
    from longfactory.memory.search import HOST_SHARE, candidates

    job = with_masters(job, split)
    for settings in candidates(job, "auto"):
        found = budget(job, settings)
        if fits(job, found, HOST_SHARE):
            yield Combination(found.seconds, settings, split)


@contextlib.contextmanager
def forced(way: Combination) -> Iterator[None]:
    """While open, a run takes these settings and masters, whatever its keys say."""
    from longfactory.memory.choose import choose_memory
    from longfactory.train import memory_plan

    fixed = dataclasses.asdict(way.settings)
    for name in ("pool_bytes", "layer"):  # which the plan sets after the others
        del fixed[name]
    before = memory_plan.choose_masters

    def choose_masters(job: Any, keys: Any, mode: str, *more: Any, **others: Any) -> Any:
        return choose_memory(with_masters(job, way.split), fixed, mode), way.split

    memory_plan.choose_masters = choose_masters
    try:
        yield
    finally:
        memory_plan.choose_masters = before


def measured(cfg: Any, way: Combination | None) -> dict[str, Any]:
    """Seconds of a step and GiB of a run: with the settings of a way, or as `auto` chooses.

    Raises:
        Exception: whatever ends the run.
    """
    import torch

    from longfactory.train.run import run
    from longfactory.train.verify.causes import release_memory

    release_memory()
    torch._dynamo.reset()  # functions compiled for other shapes count towards its limit
    torch.cuda.reset_peak_memory_stats()
    begun = time.time()
    with contextlib.nullcontext() if way is None else forced(way):
        run(cfg)
    log = (Path(cfg.output_dir) / "trainer_log.jsonl").read_text().splitlines()
    ends = [json.loads(line)["elapsed_seconds"] for line in log if '"loss"' in line]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "step_seconds": statistics.median(steps),
        "steps": [round(each, 4) for each in steps],
        "peak_gib": torch.cuda.max_memory_allocated() / GiB,
        "seconds_in_all": round(time.time() - begun, 1),
    }


def rows_of(name: str, home: Path, a: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    """The chosen way and its competitors, one row as soon as it is measured."""
    from longfactory.memory.report import describe

    begun = time.time()
    found = plans(name, home, a.steps, a.kind if a.check else None)
    took, others = time.time() - begun, len(found.others)
    print(f"# {name}: planned in {took:.1f} s; {others} other ways fit", flush=True)
    for number, way in enumerate([found.chosen, *nearest(found, a.slower, a.ways)]):
        masters = "" if found.cfg.method.finetuning_type != "full" else "; masters: "
        row: dict[str, Any] = {
            "name": name,
            "way": "auto" if number == 0 else f"competitor {number}",
            "planned_seconds": way.seconds,
            "settings": describe(way.settings) + (masters and masters + _masters(way)),
        }
        if a.check:
            row["error"] = "not run (--check)"
        elif time.time() > end:
            row["error"] = "not started: the time of this command was up"
        else:
            try:
                row |= measured(found.cfg, None if number == 0 else way)
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                row["error"] = f"failed: {lines[0][:200]}"
        yield row


def _masters(way: Combination) -> str:
    return "split" if way.split else "fp32"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| setting | way | planned s | step s | peak GiB | over the fastest | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        best = min((r["step_seconds"] for r in mine if "step_seconds" in r), default=0.0)
        for r in mine:
            got = [r.get("error", ""), "", ""]
            if "step_seconds" in r:
                over = r["step_seconds"] / best
                got = [f"{r['step_seconds']:.3f}", f"{r['peak_gib']:.1f}", f"{over:.3f}"]
            cells = [name, r["way"], f"{r['planned_seconds']:.2f}", *got, r["settings"]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(out: Path, rows: Sequence[dict[str, Any]], made: dict[str, str]) -> None:
    """The rows in place of earlier ones of the same settings, and all as a table; `notes` of the
    file stay, below it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plan_choice.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    names = {r["name"] for r in rows if "step_seconds" in r}
    kept = [r for r in old.get("rows", []) if r["name"] not in names]
    every = kept + [{**r, "made": made} for r in rows if r["name"] in names]
    path.write_text(json.dumps({**old, "rows": every}, indent=1) + "\n")
    lines = dict.fromkeys(made_by(r["made"]) for r in every)
    title = "# What memory: auto chooses, beside its competitors"
    text = [title, table(every).strip(), *old.get("notes", []), *lines]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")


def made_by(made: dict[str, str]) -> str:
    """The command, and what it ran on."""
    return f"`{made['command']}` ({made['date']}, {made['machine']}, {made['versions']})"


def share_of(text: str) -> tuple[int, int]:
    """`2/3`: the second of three shares."""
    mine, _, of = text.partition("/")
    if not (mine.isdigit() and of.isdigit() and 1 <= int(mine) <= int(of)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1/2 or 2/2")
    return int(mine), int(of)


def on_each_gpu(a: argparse.Namespace, names: Sequence[str], gpus: int) -> list[dict[str, Any]]:
    """The settings dealt to processes with one GPU each; what they print comes as they print it."""
    running = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    for place in range(min(gpus, len(names))):
        command = [sys.executable, __file__, "--only", *names[place::gpus]]
        for key in ("steps", "ways", "slower", "limit"):
            command += [f"--{key}", str(getattr(a, key))]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible[place]}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    rows: list[dict[str, Any]] = []

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("{", "#")):
                print(line, end="", flush=True)
            if line.startswith("{"):
                rows.append(json.loads(line))

    readers = [threading.Thread(target=read, args=(process,)) for process in running]
    for reader in readers:
        reader.start()
    for reader, process in zip(readers, running, strict=True):
        reader.join()
        process.wait()
    order = list(SETTINGS)
    return sorted(rows, key=lambda row: order.index(row["name"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--share", type=share_of, default=(1, 1), help="1/2: every other setting")
    parser.add_argument("--steps", type=int, default=4, help="at most 3 for rows above 16,384")
    parser.add_argument("--ways", type=int, default=4, help="competitors of a setting")
    parser.add_argument("--slower", type=float, default=1.6)
    parser.add_argument("--limit", type=float, default=270, help="no run begins later")
    parser.add_argument("--kind", default="H200", help="of GPU, for --check")
    parser.add_argument("--check", action="store_true", help="plan every way, run none")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    end = time.time() + a.limit
    import torch
    import transformers

    mine, of = a.share
    names = a.only[mine - 1 :: of]
    gpus = torch.cuda.device_count()
    if not a.check and gpus == 0:
        raise SystemExit("This measures on GPUs, and there is none. --check plans without one.")
    made = {
        "machine": f"1 x {machine_name()}",
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    rows: list[dict[str, Any]] = []
    if gpus > 1 and not a.check:
        rows = on_each_gpu(a, names, gpus)
    else:
        from longfactory import launch

        launch.set_environment(1)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LONGFACTORY_CACHE"] = str(Path(folder) / "cache")
            for name in names:
                try:
                    for row in rows_of(name, Path(folder), a, end):
                        rows.append(row)
                        print(json.dumps(row), flush=True)
                except (Exception, SystemExit) as error:  # of one setting: the others go on
                    print(f"# {name}: not planned: {type(error).__name__}: {error}", flush=True)
    print(f"\n{table(rows)}\n{made_by(made)}")
    if a.out is not None and not a.check:
        write(a.out, rows, made)
    return int(any("error" in r for r in rows) and not a.check)


if __name__ == "__main__":
    raise SystemExit(main())
