"""`longfactory train` over combinations of method, precision, processes, stage and family, against
a plain loop.

    python benchmarks/matrix.py --gpus 2                # every pair of settings, several runs at a time on each GPU
    python benchmarks/matrix.py --gpus 2 --qlora        # quantised bases alone (bitsandbytes)
    python benchmarks/matrix.py --cpu --rows 12         # on a CPU: one process and DDP, fp32 and bf16

Each row is a run of three steps through the command. Its losses and gradient norms are compared
with those of a loop in plain transformers (`_matrix_reference.py`): the distance to that loop in
float32 may be at most `FACTOR` times the loop's own largest distance in the same precision, plus
one rounding of the number. A row outside of that is compared once more, with the largest error of
`LOOPS` further loops whose embeddings are moved by up to half of a rounding: where experts change
at ties, one loop tells too little of its precision. Combinations that a documented rule refuses are
rows as well, with the sentence. Rows that are in the results already are not run again (`--again`
does).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from _matrix_families import FAMILIES, add_value_head, make_checkpoint  # noqa: E402
from _matrix_reference import (  # noqa: E402
    BETA,
    LEARNING_RATE,
    MAX_NORM,
    MICRO_SAMPLES,
    RANK,
    SEED,
    STEP_SAMPLES,
    STEPS,
)
from _table import of_visible  # noqa: E402
from longfactory.sp.distance import worst  # noqa: E402

FACTOR = 3.0
"""Times the plain loop's own error. Two computations in one precision, of equal quality, differ by
up to twice that.
"""
ROUNDING = {"fp32": 2.0**-14, "bf16": 2.0**-8, "pure_bf16": 2.0**-8, "fp16": 2.0**-10}
"""Relative. A loop's own error can be zero by chance: half precision rounds a number to 8 or 11
bits; float32 sums of some 10,000 terms in another order agree to about 14 bits."""
LOOPS = 6
"""Loops with moved embeddings, for a row that differs by more than the first loop's error allows."""
AXES: dict[str, tuple[str, ...]] = {
    "finetuning": ("full", "freeze", "lora"),
    "precision": ("fp32", "bf16", "pure_bf16", "fp16"),
    "processes": ("one", "ddp", "fsdp2", "zero2", "zero3"),
    "sp": ("1", "2"),
    "stage": ("sft", "pt", "dpo", "kto", "rm"),
    "family": tuple(FAMILIES),
}
NOT_FINITE = "not finite, nor is the plain loop in this precision"
OVERFLOW = "same up to an fp16 overflow in step"
AS_IT_SHOULD_BE = ("same", "refused as documented", NOT_FINITE)
Case = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A combination that the documentation refuses: a test of a case, words of the sentence, and a
    case that shows it.
    """

    refuses: Callable[[Case], bool]
    words: str
    example: Case


RULES = (
    Rule(
        lambda c: c["processes"] == "one" and c["sp"] == "2",
        "sequence_parallel_size: 2 needs 2 processes",
        {"processes": "one", "sp": "2"},
    ),
    Rule(
        lambda c: c["precision"] == "pure_bf16" and c["processes"] == "zero3",
        "pure_bf16 and ZeRO-3 cannot be used together",
        {"precision": "pure_bf16", "processes": "zero3"},
    ),
    Rule(
        lambda c: c["finetuning"] == "qlora" and c["processes"] == "zero3",
        "quantization_bit",
        {"finetuning": "qlora", "processes": "zero3"},
    ),
)


def pairwise(axes: dict[str, tuple[str, ...]], seed: int = 0) -> list[Case]:
    """Cases in which every pair of values of two axes occurs, unless a rule refuses it. Greedy; the
    same every time.
    """
    names, draw = list(axes), random.Random(seed)

    def allowed(case: Case) -> bool:
        return not any(rule.refuses(case) for rule in RULES)

    def random_case(fixed: Case) -> Case | None:
        for _ in range(50):
            case = {name: fixed.get(name) or draw.choice(axes[name]) for name in names}
            if allowed(case):
                return case
        return None

    def pairs(case: Case) -> set[tuple[str, str, str, str]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in axes[a]
        for y in axes[b]
        if random_case({a: x, b: y}) is not None
    }
    cases: list[Case] = []
    while wanted:
        a, x, b, y = min(wanted)
        drawn = [random_case({a: x, b: y}) for _ in range(200)]
        best = max((c for c in drawn if c), key=lambda case: len(pairs(case) & wanted))
        cases.append(best)
        wanted -= pairs(best)
    return cases


def covering(cases: Sequence[Case], axes: dict[str, tuple[str, ...]], rows: int) -> list[Case]:
    """At most `rows` of the cases, those first that bring values not seen before."""
    left, chosen, seen = list(cases), [], set()
    while left and len(chosen) < rows:
        best = max(left, key=lambda case: len(set(case.items()) - seen))
        left.remove(best)
        chosen.append(best)
        seen |= set(best.items())
    return chosen


def write_data(folder: Path) -> None:
    """Documents of 100 to 300 tokens, longer than the families' windows, in the forms that the
    stages read.
    """
    draw = random.Random(7)
    words = ("the", "a", "model", "window", "token", "long", "context", "gradient", "exact", "row")

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    def prompt() -> str:
        return text(draw.randint(20, 60))

    def answer() -> str:
        return text(draw.randint(20, 80))

    rows: dict[str, list[dict[str, Any]]] = {
        "talks": [{"instruction": prompt(), "output": answer()} for _ in range(24)],
        "texts": [{"text": text(draw.randint(100, 200))} for _ in range(80)],
        "pairs": [
            {"instruction": prompt(), "chosen": answer(), "rejected": answer()} for _ in range(24)
        ],
        "marks": [
            {"instruction": prompt(), "output": answer(), "good": i % 3 != 1} for i in range(24)
        ],
    }
    columns: dict[str, dict[str, Any]] = {
        "talks": {},
        "texts": {"columns": {"prompt": "text"}},
        "pairs": {
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "marks": {
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    info = {name: {"file_name": f"{name}.json", **entry} for name, entry in columns.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info))


DATASETS = {"sft": "talks", "pt": "texts", "dpo": "pairs", "rm": "pairs", "kto": "marks"}


def model_folder(case: Case) -> str:
    """ZeRO-3 and quantised bases draw the numbers of a new value head in another order: there the
    checkpoint brings one.
    """
    drawn_elsewhere = case["processes"] == "zero3" or case["finetuning"] == "qlora"
    valued = case["stage"] == "rm" and drawn_elsewhere
    return f"{case['family']}-valued" if valued else case["family"]


def loop_precision(case: Case) -> str:
    """The precision of the plain loop that is the measure. Under DeepSpeed the weights themselves
    are bf16.
    """
    zero = case["processes"].startswith("zero") and case["precision"] == "bf16"
    return "bf16_weights" if zero else case["precision"]


def keys(case: Case, home: Path, output: Path, cpu: bool) -> dict[str, Any]:
    """The run's YAML, as a user of LLaMA-Factory writes it."""
    world = 1 if case["processes"] == "one" else 2
    groups = world // int(case["sp"]) or 1
    given: dict[str, Any] = {
        "model_name_or_path": str(home / "models" / model_folder(case)),
        "stage": case["stage"],
        "do_train": True,
        "finetuning_type": "lora" if case["finetuning"] == "qlora" else case["finetuning"],
        "dataset": DATASETS[case["stage"]],
        "dataset_dir": str(home / "data"),
        "template": "chatml",
        "cutoff_len": 512,
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": MICRO_SAMPLES // groups,
        "gradient_accumulation_steps": STEP_SAMPLES // MICRO_SAMPLES,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "optim": "adamw_torch",
        "seed": SEED,
        "disable_shuffling": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "preprocessing_num_workers": 1,
    }
    if case["stage"] in ("dpo", "kto"):
        given["pref_beta"] = BETA
    if case["finetuning"] in ("lora", "qlora"):
        given |= {"lora_target": "all", "lora_rank": RANK, "lora_dropout": 0.0}
    if case["finetuning"] == "qlora":
        given["quantization_bit"] = 4
    if case["finetuning"] == "freeze":
        given["freeze_trainable_layers"] = 1
    if case["precision"] != "fp32":
        given[case["precision"]] = True
    if case["sp"] != "1":
        given["sequence_parallel_size"] = int(case["sp"])
    if case["processes"] in ("ddp", "fsdp2"):
        given["sharding"] = case["processes"]
    if case["processes"].startswith("zero"):
        stage = case["processes"][-1]
        given["deepspeed"] = str(
            HERE.parent / "examples" / "deepspeed" / f"ds_z{stage}_config.json"
        )
    if cpu:
        given["use_cpu"] = True
    return given


class Devices:
    """Places for runs: each GPU takes several at a time, a run of two processes one place on each
    of two GPUs.
    """

    def __init__(self, gpus: int, each: int):
        self.free = [each] * gpus
        self.changed = threading.Condition()

    def take(self, count: int) -> list[int]:
        with self.changed:
            while sum(places > 0 for places in self.free) < count:
                self.changed.wait()
            order = sorted(range(len(self.free)), key=lambda gpu: -self.free[gpu])[:count]
            for gpu in order:
                self.free[gpu] -= 1
            return order

    def give(self, gpus: Sequence[int]) -> None:
        with self.changed:
            for gpu in gpus:
                self.free[gpu] += 1
            self.changed.notify_all()


def environment(home: Path, gpus: Sequence[int], cpu: bool) -> dict[str, str]:
    source = str(HERE.parent / "src")
    paths = os.pathsep.join([source, str(HERE), os.environ.get("PYTHONPATH", "")])
    given = {
        **os.environ,
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if cpu else "4"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "" if cpu else of_visible(sorted(gpus)),
    }
    given.setdefault("NCCL_NVLS_ENABLE", "0")
    return given


def run_case(case: Case, home: Path, devices: Devices | None, limit: float) -> dict[str, Any]:
    """One run through the command: exit code, seconds, losses, gradient norms, and the last lines
    where it failed.
    """
    cpu = devices is None
    name = "-".join(case[axis] for axis in AXES)
    folder = home / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    yaml = folder / "run.yaml"
    yaml.write_text(json.dumps(keys(case, home, folder / "out", cpu), indent=1))  # JSON is YAML
    processes = 1 if case["processes"] == "one" else 2
    gpus = [] if devices is None else devices.take(processes)
    begun = time.time()
    try:
        env = environment(home, gpus, cpu)
        env["LONGFACTORY_CACHE"] = str(folder / "cache")
        words = [
            sys.executable,
            "-m",
            "longfactory.cli",
            "train",
            str(yaml),
            f"nproc_per_node={processes}",
        ]
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                words, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                code = 124
    finally:
        if devices is not None:
            devices.give(gpus)
    found: dict[str, Any] = {**case, "rc": code, "seconds": round(time.time() - begun, 1)}
    state = folder / "out" / "trainer_state.json"
    if code == 0 and state.is_file():
        history = [h for h in json.loads(state.read_text())["log_history"] if "loss" in h]
        found["loss"] = [h["loss"] for h in history]
        found["grad_norm"] = [h["grad_norm"] for h in history]
    else:
        found["error"] = last_words(folder / "log")
    return found


def last_words(log: Path) -> str:
    """The sentence with which a run ended, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error" in line and "ChildFailedError" not in line and "error_file" not in line:
            return line[-400:]
    return lines[-1][-400:] if lines else "no output"


def compare(
    row: dict[str, Any],
    exact: dict[str, Any],
    same: dict[str, Any],
    moved: Sequence[dict[str, Any]] = (),
) -> tuple[str, float]:
    """(verdict, the largest error over what is allowed). `exact`: the loop in float32; `same`: in
    the row's precision; `moved`: further loops in it, with moved embeddings.
    """
    if "error" in exact or "error" in same:
        return "no reference: " + exact.get("error", same.get("error", "")), math.nan
    largest, compared = 0.0, STEPS
    for name in ("grad_norm", "loss"):
        if len(row[name]) != STEPS:
            return f"{len(row[name])} steps logged", math.nan
        finite = [
            math.isfinite(x) and math.isfinite(y)
            for x, y in zip(row[name], same[name], strict=True)
        ]
        if not any(map(math.isfinite, same[name])) and not any(map(math.isfinite, row[name])):
            return NOT_FINITE, math.nan
        if not all(finite) and row["precision"] != "fp16":
            return f"{name} is {row[name]}, of the plain loop {same[name]}", math.inf
        # After an overflow that one side had alone, the scaler skips its update alone: no further
        # step can be compared.
        steps = STEPS if all(finite) else finite.index(False)
        compared = min(compared, steps)
        # The loop's error in one step may be small by chance: its largest one stands for its
        # precision.
        errors = [
            abs(a - b)
            for loop in (same, *moved)
            for a, b in zip(loop.get(name, []), exact[name], strict=False)
            if math.isfinite(a)
        ]
        for ours, true in list(zip(row[name], exact[name], strict=True))[
            : compared + (name == "loss")
        ]:
            allowed = FACTOR * max(errors) + ROUNDING[row["precision"]] * max(abs(true), 1e-3)
            largest = worst((largest, abs(ours - true) / allowed))
    if not largest <= 1:  # NaN, too
        return "DIFFERENT", largest
    return ("same" if compared == STEPS else f"{OVERFLOW} {compared + 1}"), largest


def good(row: dict[str, Any]) -> bool:
    """Whether a row is as it should be."""
    return row["verdict"] in AS_IT_SHOULD_BE or row["verdict"].startswith(OVERFLOW)


def reference_key(case: dict[str, Any], precision: str | None = None) -> tuple[str, ...]:
    kept = {**case, "precision": precision or case["precision"]}
    folder = case.get("model") or model_folder(case)
    return folder, *(str(kept[k]) for k in ("stage", "finetuning", "precision"))


def reference_cases(cases: Sequence[Case], home: Path) -> dict[str, list[dict[str, Any]]]:
    """Cases of the plain loop by family, without repetition: in the row's precision and in float32."""
    by_family: dict[str, dict[tuple[str, ...], dict[str, Any]]] = {}
    for case in cases:
        for precision in {loop_precision(case), "fp32"}:
            wanted = {k: case[k] for k in ("family", "stage", "finetuning")}
            wanted |= {"precision": precision, "model": model_folder(case)}
            wanted["folder"] = str(home / "models" / wanted["model"])
            plain = {**case, "precision": "fp32", "processes": "one", "sp": "1"}
            if case["finetuning"] == "qlora":
                plain["finetuning"] = "lora"
            name = f"data-{case['family']}-{case['stage']}.yaml"
            yaml = home / name
            yaml.write_text(json.dumps(keys(plain, home, home / "unused", True)))
            wanted["yaml"] = str(yaml)
            by_family.setdefault(case["family"], {})[reference_key(wanted)] = wanted
    return {family: list(found.values()) for family, found in by_family.items()}


def run_references(
    family: str, jobs: list[dict[str, Any]], home: Path, devices: Devices | None
) -> list[dict[str, Any]]:
    gpus = [] if devices is None else devices.take(1)
    try:
        listed, results = home / f"reference-{family}.json", home / f"reference-{family}.jsonl"
        listed.write_text(json.dumps(jobs))
        results.unlink(missing_ok=True)
        env = environment(home, gpus, devices is None)
        env["LONGFACTORY_CACHE"] = str(home / "cache" / family)
        with open(home / f"reference-{family}.log", "w") as log:
            words = [sys.executable, str(HERE / "_matrix_reference.py"), str(listed), str(results)]
            subprocess.run(words, env=env, stdout=log, stderr=subprocess.STDOUT)
    finally:
        if devices is not None:
            devices.give(gpus)
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def moved_loops(row: dict[str, Any], home: Path, devices: Devices | None) -> list[dict[str, Any]]:
    """The plain loop of a row in its precision, `LOOPS` times, with moved embeddings."""
    case = {name: row[name] for name in AXES}
    (jobs,) = reference_cases([case], home).values()
    job = next(j for j in jobs if j["precision"] == loop_precision(case))
    wanted = [{**job, "jitter": seed} for seed in range(1, LOOPS + 1)]
    return run_references(row["family"], wanted, home, devices)


def refused_cases(axes: dict[str, tuple[str, ...]]) -> list[tuple[Case, Rule]]:
    plain = {name: values[0] for name, values in axes.items()}
    return [
        ({**plain, **rule.example}, rule)
        for rule in RULES
        if all(value in axes[name] for name, value in rule.example.items())
    ]


def machine(cpu: bool) -> str:
    import accelerate
    import peft
    import torch
    import transformers

    place = "CPU" if cpu else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return (
        f"{place}; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}, peft {peft.__version__}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The committed table."""
    runs = Counter((r["command"], r["machine"]) for r in rows)
    lines = [
        "# `longfactory train` against a plain loop",
        "",
        *(f"- `{command}`: {count} rows on {where}" for (command, where), count in runs.items()),
        "",
        f"{sum(map(good, rows))} of {len(rows)} rows as they should be.",
        "",
        (
            "Three steps each. *of allowed*: the largest difference of a loss or gradient norm to"
            f" the plain loop in float32, over {FACTOR:g} times that loop's own largest error in"
            " the row's precision plus one rounding of the number"
            f" ({', '.join(f'{k} {v:.1e}' for k, v in ROUNDING.items())}). Up to 1 is the same."
            " Under DeepSpeed with bf16 the loop has bf16 weights with float32 copies. Where a row"
            f" was outside of the first loop's error, the largest of {LOOPS} further loops, whose"
            " embeddings are moved by up to half of a rounding, is taken; *of one loop* is what the"
            " first one said."
        ),
        "",
        (
            "| method | precision | processes | SP | stage | family | rc | losses | gradient norms"
            " | of allowed | verdict | s |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: tuple(r[a] for a in AXES)):
        losses = " ".join(f"{x:.5g}" for x in r.get("loss", []))
        norms = " ".join(f"{x:.4g}" for x in r.get("grad_norm", []))
        verdict = (
            r["verdict"] if r["verdict"] == "same" else f"{r['verdict']}: {r.get('error', '')}"
        )
        if "worst_of_one_loop" in r:
            verdict += f" ({r['worst_of_one_loop']:.2f} of one loop)"
        cells = [*(r[a] for a in AXES), str(r["rc"]), losses, norms, f"{r['worst']:.2f}", verdict]
        lines.append("| " + " | ".join([*cells, f"{r['seconds']:.0f}"]).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--qlora", action="store_true", help="quantised bases alone")
    parser.add_argument("--rows", type=int, help="at most so many of the pairwise rows")
    parser.add_argument("--only", nargs="*", default=(), help="AXIS=VALUE,VALUE: these alone")
    parser.add_argument("--each", type=int, default=4, help="runs at a time on one GPU")
    parser.add_argument("--time", type=float, default=560, help="seconds for the whole command")
    parser.add_argument("--again", action="store_true", help="run rows again that have results")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", help="of the result files")
    parser.add_argument("--home", type=Path, help="where models, data and runs are kept")
    options = parser.parse_args()
    end = time.time() + options.time
    axes = dict(AXES)
    if options.qlora:
        axes |= {
            "finetuning": ("qlora",),
            "precision": ("bf16", "fp16"),
            "processes": ("one", "ddp", "fsdp2", "zero2", "zero3"),
        }
    if options.cpu:
        axes |= {"precision": ("fp32", "bf16", "pure_bf16"), "processes": ("one", "ddp")}
    elif options.gpus == 1:
        axes |= {"processes": ("one",), "sp": ("1",)}
    for axis, _, values in (only.partition("=") for only in options.only):
        if unknown := set(values.split(",")) - set(axes.get(axis, ())):
            known = ", ".join(axes.get(axis, axes))
            parser.error(f"--only {axis}={values}: no {', '.join(sorted(unknown))} among {known}")
        axes[axis] = tuple(values.split(","))
    cases = pairwise(axes)
    if options.rows:
        cases = covering(cases, axes, options.rows)
    refused = refused_cases(axes)
    name = (
        options.name
        or f"matrix{'_qlora' if options.qlora else ''}_{'cpu' if options.cpu else f'{options.gpus}_gpus'}"
    )
    results = options.out / f"{name}.json"
    old = json.loads(results.read_text())["rows"] if results.is_file() and not options.again else []
    done = {tuple(r[a] for a in AXES) for r in old if good(r)}
    cases = [c for c in cases if tuple(c[a] for a in AXES) not in done]
    refused = [(c, rule) for c, rule in refused if tuple(c[a] for a in AXES) not in done]

    home = options.home or Path(tempfile.mkdtemp(prefix="longfactory-matrix-"))
    home.mkdir(parents=True, exist_ok=True)
    write_data(home / "data")
    for family in {c["family"] for c in cases} | {c["family"] for c, _ in refused}:
        make_checkpoint(family, home / "models" / family)
    for case in cases:
        if model_folder(case) != case["family"]:
            valued = make_checkpoint(case["family"], home / "models" / model_folder(case))
            add_value_head(valued)
    devices = None if options.cpu else Devices(options.gpus, options.each)
    workers = 2 if options.cpu else options.gpus * options.each
    print(f"{len(cases)} runs, {len(refused)} refused combinations", flush=True)

    references: dict[tuple[str, ...], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []

    def one(case: Case, rule: Rule | None = None) -> dict[str, Any] | None:
        left = end - time.time()
        if left < 30:
            return None
        row = run_case(case, home, devices, min(left - 5, 300))
        if rule is not None:
            told = (
                row["rc"] != 0
                and rule.words
                in (home / "runs" / "-".join(case[a] for a in AXES) / "log").read_text()
            )
            row |= {
                "verdict": "refused as documented" if told else "NOT refused",
                "worst": math.nan,
            }
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(workers) as pool:
        plain = [
            pool.submit(run_references, family, jobs, home, devices)
            for family, jobs in reference_cases(cases, home).items()
        ]
        started = [pool.submit(one, case) for case in cases]
        started += [pool.submit(one, case, rule) for case, rule in refused]
        for future in plain:
            references.update({reference_key(r): r for r in future.result()})
        rows = [row for future in started if (row := future.result()) is not None]
    missing = {"error": "the plain loop has no numbers"}
    for row in rows:
        if "verdict" in row:
            continue
        if row["rc"] != 0 or "loss" not in row:
            row |= {"verdict": "FAILED", "worst": math.nan}
            continue
        exact, same = (
            references.get(reference_key(row, "fp32"), missing),
            references.get(reference_key(row, loop_precision(row)), missing),
        )
        row["verdict"], row["worst"] = compare(row, exact, same)
        row["plain"] = {"fp32": exact, loop_precision(row): same}
        if row["verdict"] == "DIFFERENT":
            # the loops of moved embeddings, one after the other: there are few such rows
            moved = moved_loops(row, home, devices)
            row["worst_of_one_loop"], row["moved"] = row["worst"], moved
            row["verdict"], row["worst"] = compare(row, exact, same, moved)
    words = [w for w in sys.argv[1:] if w not in ("--again",)]
    for flag in ("--home", "--out", "--time", "--name"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    command = " ".join(["python benchmarks/matrix.py", *words])
    where = machine(options.cpu)
    for row in rows:
        row |= {"machine": where, "command": command}
    merged = {tuple(r[a] for a in AXES): r for r in [*old, *rows]}
    every = list(merged.values())
    options.out.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"rows": every}, indent=1) + "\n")
    results.with_suffix(".md").write_text(table(every))
    bad = [r for r in every if not good(r)]
    for row in bad:
        print(
            "BAD",
            {a: row[a] for a in AXES},
            row["verdict"],
            row.get("error", ""),
            row["worst"],
            flush=True,
        )
    print(f"{len(every) - len(bad)} of {len(every)} rows as they should be; {results}", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
