"""Complete training steps of the shapes that are post-trained now, through `longfactory train` with
random weights, beside transformers alone and beside a roofline that is measured in the same command.

    python benchmarks/models.py --gpus 0 --rows gemma-12-layers-8k gemma-12-layers-32k --out DIR
    python benchmarks/models.py --gpus 0,1 --rows moe-6-layers-16k --systems ours --together
    python benchmarks/models.py --gpus 0 --rows moe-6-layers-16k --systems ours --profile
    python benchmarks/models.py --render DIR/models.json PRINTED.log ... --out benchmarks/results

A row is a shape, a method and the tokens that each GPU holds; with several GPUs
(`--gpus 0,1`, counted among the visible ones) they share one row of so many times the length
(sequence_parallel_size). Systems:

    ours       longfactory train, memory: auto; `--sharding` as by default of the command, or fsdp2, ddp
    rates      seconds of the row's products, grouped products and attention on one GPU, each at its
               own shape (`_model_rows.py`)
    hf         transformers alone with sdpa and gradient checkpointing, hf-stored without it; with
               Liger's kernels where they are installed and know the family (its experts' are tuned
               in the first step of a mixture, some 240 kernels: minutes)
    unsloth    LoRA of dense models by Unsloth, where it can be imported; rows of one model share a
               process

The roofline of a step is the time of its products at the rates measured for their shapes, of grouped
products at the experts' shapes, of attention with the heads and masks of its layers, and of the
optimizer's bytes at the speed of a copy; what the run computes twice counts twice. Norms, rotary,
routing, dispatch to experts and messages between GPUs have no part in it. `ideal` is the
attention-corrected speed of several GPUs: 1 / (t1 - a1 + a2), t1 the time of a token on one GPU with
as many tokens, a1 and a2 attention's time of a token at this length and at the whole row's. Shares
are of measurements of one run on one machine; others have none.

Each measurement is a process of its own with a time limit. With `--together` Python starts once for
all rows of the command, and once for all other systems but Unsloth: a row's processes are forked from
one that has imported everything, and each calls what `longfactory train` calls in it. One that fails is
in the table with its reason. What is printed is enough to make the table
(`--render`). Several commands can run side by side on the GPUs of one machine, each with its own --out.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "src"))
import _parts  # noqa: E402
import _profile  # noqa: E402
from _many_commands import Job, in_one_group  # noqa: E402
from _table import (  # noqa: E402
    LEAST,
    Clock,
    GiB,
    command_line,
    job,
    log_file,
    machine_name,
    of_visible,
    run_row,
    write,
)
from plan_accuracy import (  # noqa: E402
    FULL,
    LORA,
    PT,
    QLORA,
    Setting,
    keys_of,
    of_run,
    run,
    write_shape,
)

DDP: dict[str, Any] = {"sharding": "ddp"}
ROWS: dict[str, Setting] = {
    "moe-6-layers-16k": Setting("qwen3-30b-a3b", 6, 16384, PT | FULL),
    "moe-6-layers-64k": Setting("qwen3-30b-a3b", 6, 65536, PT | FULL),
    "gemma-12-layers-8k": Setting("gemma-3-12b", 12, 8192, PT | FULL),
    "gemma-12-layers-32k": Setting("gemma-3-12b", 12, 32768, PT | FULL),
    "7b-full-8k": Setting("qwen2.5-7b", None, 8192, PT | FULL),
    "7b-full-32k": Setting("qwen2.5-7b", None, 32768, PT | FULL),
    "7b-lora-8k": Setting("qwen2.5-7b", None, 8192, PT | LORA),
    "7b-lora-32k": Setting("qwen2.5-7b", None, 32768, PT | LORA),
    "gpt-oss-6-layers-32k": Setting("gpt-oss-20b", 6, 32768, PT | FULL),
    "glm-4.5-air-2-layers-16k": Setting("glm-4.5-air", 2, 16384, PT | FULL),
    "deepseek-v2-lite-6-layers-16k": Setting("deepseek-v2-lite", 6, 16384, PT | FULL),
    "moe-lora-64k": Setting("qwen3-30b-a3b", None, 65536, PT | LORA | DDP),
    "moe-qlora-64k": Setting("qwen3-30b-a3b", None, 65536, PT | QLORA | DDP),
}
"""`tokens`: of each GPU."""
SMOKE: dict[str, Setting] = {
    "tiny-full": Setting("tiny", None, 256, PT | FULL),
    "tiny-lora": Setting("tiny", None, 256, PT | LORA),
}
SYSTEMS = ("ours", "rates", "hf", "hf-stored", "unsloth")
NAMES = {
    "ours": "LongFactory",
    "hf": "transformers alone",
    "hf-stored": "transformers alone, nothing recomputed",
    "unsloth": "Unsloth",
}
UPDATE_BYTES, SPLIT_UPDATE_BYTES = 32, 28
"""Of one trained weight in an optimizer step: AdamW reads weight, two states and gradient and writes
three of them, in float32; clipping reads the gradient. Split masters: gradients have 2 bytes."""


def ours(
    name: str, at: Setting, gpus: int, steps: int, home: Path, limit: float, profile: Path | None
) -> dict[str, Any]:
    """One run of the command, in the form of `_table.py`'s results. `profile`: a step more is
    recorded after those that are timed, printed by its parts, and kept in this folder.
    """
    whole = whole_row(at, gpus)
    steps = steps_of(whole, steps)
    if profile:
        whole = whole._replace(keys=whole.keys | _profile.RECORDED | {"profiler_wait_steps": steps})
    about = about_ours(name, at, gpus)
    try:
        more = 2 if profile else 0
        found = run(name, whole, gpus, steps + more, home, limit=limit, timed=steps)
    except Exception as error:  # a log that lacks what is read from it
        return {**about, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    if "error" in found:
        print(found["log"], flush=True)
        return {**about, "error": found["error"]}
    if profile:
        print_trace(name, home, profile)
    return {**about, **measured(found)}


def print_trace(name: str, home: Path, keep: Path) -> None:
    """Where the recorded step of a run spent its time, if one was recorded. The traces of all its
    processes go into the folder `keep`, compressed.
    """
    traces = sorted((home / f"out-{name}" / "profiler").glob("trace_rank*.json"))
    for trace in traces:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}-{trace.name}.gz").write_bytes(gzip.compress(trace.read_bytes()))
    for trace in [trace for trace in traces if trace.name.startswith("trace_rank0_")][:1]:
        items, ranges, _ = _parts.read(trace)
        waits = "\n".join(_parts.waits(_parts.placed(items, ranges)))
        print(f"\n{name}, one step on GPU 0:\n{_profile.table(trace)}\n\n{waits}\n", flush=True)


def about_ours(name: str, at: Setting, gpus: int) -> dict[str, Any]:
    """What tells a measurement of ours from others, and where it comes from."""
    about = {"row": "ours", "kernel": "auto", "tokens": at.tokens, "gpus": gpus, "name": name}
    return {**about, "command": command_line(), "date": today(), "run": this_run()}


def this_run() -> str:
    """The same for commands on one machine that was not started anew between them."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip()[:8] if file.exists() else ""


def whole_row(at: Setting, gpus: int) -> Setting:
    """The row that several GPUs share."""
    return at._replace(tokens=at.tokens * gpus)


def steps_of(whole: Setting, steps: int) -> int:
    """Two of rows whose step takes half a minute."""
    return min(steps, 2) if whole.layers is None and whole.tokens > 100_000 else steps


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run, as `plan_accuracy.of_run` reads it."""
    keep = ("split", "kernels", "expert_max_load", "expert_dead", "predicted_seconds", "loss")
    return {
        **{key: found[key] for key in keep if key in found},
        "seconds": found["step_seconds"],
        "peak": found["peak_gib"] * GiB,
        "steps": found["steps"],
        "settings": found.get("settings", ""),
        "versions": versions(),
    }


SHOWN = (
    r"^(Imported in|\[[0-9:]+\] (Training data|Attention kernel|Trainable parameters|From the command"
    r"|step ))"
)
"""Of a run's lines, those that say how far it is."""


def ours_together(
    names: Sequence[str],
    rows: dict[str, Setting],
    devices: Sequence[int | str],
    steps: int,
    home: Path,
    clock: Clock,
    after: Path | None,
    profile: Path | None,
) -> Iterator[dict[str, Any]]:
    """Runs of several rows, Python started once.

    Args:
        after: the first begins when there is such a file.
        profile: as of `ours`, but of rows that have as many steps as the others.
    """
    left, gpus = list(names), len(devices)

    def jobs() -> list[Job]:
        found = []
        for name in names:
            whole = whole_row(rows[name], gpus)
            ran = steps_of(whole, steps)
            if profile and ran == steps:
                whole = whole._replace(
                    keys=whole.keys | _profile.RECORDED | {"profiler_wait_steps": steps}
                )
                ran += 2
            keys = keys_of(name, whole, gpus, ran, home)
            found.append(Job(name, {key: str(value) for key, value in keys.items()}))
        return found

    done: list[dict[str, Any]] = []

    def tell(name: str, row: dict[str, Any]) -> None:
        left.remove(name)
        found = row if "error" in row else measured(row)
        done.append({**about_ours(name, rows[name], gpus), **found})
        print(json.dumps(done[-1]), flush=True)
        if profile:
            print_trace(name, home, profile)

    def read(text: str, out: Path) -> dict[str, Any]:
        return of_run(text, out, steps)

    in_one_group(home, devices, jobs, clock.end, tell, after, read, SHOWN)
    yield from done
    for name in left:
        print(f"{name}, ours: not started, the time of this command is up", flush=True)


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def trained(at: Setting, rates: dict[str, Any]) -> float:
    """Weights that the optimizer updates."""
    if at.keys["finetuning_type"] != "full":
        return 0.0  # adapters: less than a hundredth
    return float(rates["layer_parameters"] + rates["head_parameters"])


def attention_seconds(rates: dict[str, Any], length: int, again: float) -> float:
    """Of a whole row of `length` on one GPU, forward, backward and what is computed again."""
    at = rates["attention"][str(length)]
    return float((1 + again) * at["forward"] + at["backward"])


def passes(settings: str) -> tuple[float, float]:
    """How often a run computes layers and attention once more, by what its plan said."""
    if "every activation stored" in settings:
        return 0.0, 0.0
    saved = re.search(r"attention outputs saved in (\d+)%", settings)
    return 1.0, 1.0 - (int(saved[1]) / 100 if saved else 0.0)


def saved_mlps(settings: str) -> float:
    """The share of layers whose MLP a run does not compute again, by what its plan said."""
    saved = re.search(r"MLP (?:products|activations) saved in (\d+)%", settings)
    return int(saved[1]) / 100 if saved else 0.0


def roofline(
    at: Setting, gpus: int, rates: dict[str, Any], settings: str, split: bool = False
) -> dict[str, float]:
    """Seconds of a step by kind of work, on each of `gpus` GPUs with `at.tokens` tokens.

    Args:
        split: masters are split (`SplitAdamW`).
    """
    again, attention_again = passes(settings)
    saved = saved_mlps(settings)
    # the product whose output a norm takes is computed again all the same
    spared = saved * (2 / 3 if rates.get("norms_after") and not rates["experts"] else 1.0)
    spared *= again * rates.get("mlp_forward", 0.0)
    update = SPLIT_UPDATE_BYTES if split else UPDATE_BYTES
    full = at.keys["finetuning_type"] == "full"

    def products(of: dict[str, float], forwards: float, weights: bool) -> float:
        if not of:
            return 0.0
        return forwards * of["forward"] + of["input"] + (of["weight"] if weights else 0.0)

    return {
        "products": products(rates["linear"], 1 + again, full) - spared,
        "experts": products(rates["experts"], 1 + again * (1 - saved), full),
        "adapters": products(rates["adapters"], 1 + again, True),
        "attention": attention_seconds(rates, at.tokens * gpus, attention_again) / gpus,
        # logits are made a second time in the backward pass
        "output layer": products(rates["head"], 2.0, full),
        "optimizer": update * trained(at, rates) / gpus / rates["bandwidth"],
    }


def ideal(
    at: Setting, gpus: int, rates: dict[str, Any], one: dict[str, Any], settings: str
) -> float:
    """Attention-corrected tokens a second of each of several GPUs."""
    again = passes(settings)[1]
    t1 = one["seconds"] / at.tokens
    a1 = attention_seconds(rates, at.tokens, again) / at.tokens
    whole = at.tokens * gpus
    a2 = attention_seconds(rates, whole, again) / whole
    return 1 / (t1 - a1 + a2)


def render(results: list[dict[str, Any]]) -> str:
    """The table, and what each share is made of."""
    lines = [
        "| shape and method | tokens a GPU | GPUs | system | step, s | tokens/s a GPU |"
        " over transformers | share of roofline | share of ideal | peak, GiB a GPU | settings |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    parts = []
    every = {**ROWS, **SMOKE}
    order = {name: i for i, name in enumerate(every)}
    found = [r for r in results if r.get("name") in every and r["row"] != "rates"]
    found.sort(key=lambda r: (order[r["name"]], r["gpus"], SYSTEMS.index(r["row"])))
    for r in found:
        name, gpus, at = r["name"], r["gpus"], every[r["name"]]
        system = NAMES[r["row"]] + (" with Liger" if r.get("liger") else "")
        start = f"| {name} | {at.tokens:,} | {gpus} | {system} |"
        if "error" in r:
            lines.append(f"{start} {r['error']} | | | | | | |")
            continue
        rates = _of_run(_one(results, name, "rates", 1), r)
        speed = at.tokens / r["seconds"]
        others = [_of_run(_one(results, name, row, 1), r) for row in ("hf", "hf-stored")]
        best = max((at.tokens / o["seconds"] for o in others if o), default=0.0)
        over = f"{speed / best:.2f}x" if best and r["row"] == "ours" else ""
        share = of_ideal = ""
        if rates and r["row"] == "ours":
            seconds = roofline(at, gpus, rates, r["settings"], r.get("split", False))
            share = f"{sum(seconds.values()) / r['seconds']:.2f}"
            made = ", ".join(f"{k} {v:.3f}" for k, v in seconds.items() if v)
            parts.append(f"- {name}, {gpus} GPU{'s' if gpus > 1 else ''}: {made}")
            one = _of_run(_one(results, name, "ours", 1), r)
            if gpus > 1 and one:
                of_ideal = f"{speed / ideal(at, gpus, rates, one, r['settings']):.3f}"
        lines.append(
            f"{start} {r['seconds']:.3f} | {speed:,.0f} | {over} | {share} | {of_ideal} |"
            f" {r['peak'] / GiB:.1f} | {r.get('settings', '')} |"
        )
    if parts:
        lines += ["", "Seconds of the rooflines:", "", *parts]
    measured = []
    for r in results:
        if r["row"] == "rates" and "gemm" in r:
            grouped = f", grouped {r['grouped_mm'] / 1e12:.0f}" if r.get("grouped_mm") else ""
            measured.append(
                f"- {r['name']}: products {r['gemm'] / 1e12:.0f}{grouped}, attention forward"
                f" {r['attention_forward'] / 1e12:.0f}, backward"
                f" {r['attention_backward'] / 1e12:.0f}; copies {r['bandwidth'] / 1e12:.2f} TB/s"
            )
    if measured:
        lines += ["", "Measured rates, TFLOP/s:", "", *measured]
    return "\n".join(lines)


def _of_run(found: dict[str, Any] | None, beside: dict[str, Any]) -> dict[str, Any] | None:
    """A measurement, if it is of the same machine's run as another."""
    same = found is not None and found.get("run") == beside.get("run")
    return found if same else None


def results_of(path: Path) -> dict[str, Any]:
    """The results in a file that this command wrote, or among the lines that it printed."""
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)  # type: ignore[no-any-return]
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    return {"results": [each for each in lines if "row" in each and "name" in each]}


def _one(results: list[dict[str, Any]], name: str, row: str, gpus: int) -> dict[str, Any] | None:
    """The measurement of a row, None where there is none."""
    wanted = (name, row, gpus)
    for r in results:
        if (r.get("name"), r["row"], r["gpus"]) == wanted and "error" not in r:
            return r
    return None


def measure(args: argparse.Namespace, home: Path) -> int:
    rows = {
        name: at._replace(keys={"sharding": args.sharding, **at.keys})
        for name, at in (SMOKE if args.smoke else ROWS).items()
    }
    names = args.rows or list(rows)
    numbers = args.gpus.split(",")
    gpus = range(len(numbers))
    clock, log = Clock(args.limit), log_file("models")
    profile = args.out if args.profile else None
    about = {"machine": machine_name()}
    if not args.smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = of_visible(numbers)
    failed = False

    def keep(found: dict[str, Any], show: bool = True) -> None:
        nonlocal failed
        found = {**found, "run": this_run()}
        failed |= "error" in found
        if show:
            print(json.dumps(found), flush=True)
        write(args.out, "models", TITLE, render, [found], about)

    if "ours" in args.systems and args.together:
        for found in ours_together(names, rows, gpus, args.steps, home, clock, args.after, profile):
            keep(found, show=False)
    jobs = []
    for system in args.systems:  # of each row the first before the second of any
        for name in names:
            at = rows[name]
            if system == "ours":
                if args.together:
                    continue
                if clock.left < LEAST:
                    print(f"{name}, {system}: not started, the time of this command is up")
                    continue
                limit = min(args.each, clock.left)
                keep(ours(name, at, len(gpus), args.steps, home, limit, profile))
            elif runs_beside(system, name, at, len(gpus)):
                model = write_shape(at.shape, at.layers, home / f"model-{at.shape}-{at.layers}")
                jobs.append(beside(system, name, at, model, args.steps))
    for several in in_processes(jobs, args.together):
        if clock.left < LEAST:
            for each in several:
                about_it = f"{each['name']}, {each['row']}"
                print(f"{about_it}: not started, the time of this command is up", flush=True)
            continue
        limit = clock.left if args.together else min(args.each, clock.left)
        script = ROOT / "benchmarks" / "_model_rows.py"
        whole = {**several[0], "jobs": several}
        told: set[tuple[str, str]] = set()

        def tell(found: dict[str, Any], told: set[tuple[str, str]] = told) -> None:
            told.add((found["name"], found["row"]))
            keep(found)

        found = run_row(whole, 1, Clock(limit), log, script, tell)
        why = next((each["error"] for each in found if "error" in each), "not reached")
        for each in several:
            if (each["name"], each["row"]) not in told:
                about_it = {key: each[key] for key in ("row", "kernel", "name")}
                keep({**about_it, "tokens": each["tokens"][0], "gpus": 1, "error": why})
                why = "not reached"
    print(f"log: {log}")
    return clock.exit_code(failed and args.smoke)


def runs_beside(system: str, name: str, at: Setting, gpus: int) -> bool:
    """Whether another system than ours is measured on a row: on one GPU, and what it can."""
    if gpus > 1 or (system != "rates" and "quantization_bit" in at.keys):
        return False
    return system != "unsloth" or (
        at.keys["finetuning_type"] == "lora" and at.layers is None and "moe" not in name
    )


def beside(system: str, name: str, at: Setting, model: Path, steps: int) -> dict[str, Any]:
    """A job of `_model_rows.py`."""
    return job(
        system,
        [at.tokens],
        kernel="auto" if system == "rates" else "sdpa",
        name=name,
        lora=at.keys["finetuning_type"] == "lora",
        model=str(model),
        steps=steps,
        lengths=[at.tokens, 2 * at.tokens],
    )


def in_processes(jobs: list[dict[str, Any]], together: bool) -> Iterator[list[dict[str, Any]]]:
    """Jobs by the process that does them. Unsloth changes transformers for its whole process."""
    by: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for each in jobs:
        own = (each["row"], each["name"])
        if each["row"] == "unsloth":
            own = ("unsloth", each["model"])
        by.setdefault(("together",) if together and each["row"] != "unsloth" else own, []).append(
            each
        )
    yield from by.values()


TITLE = "# Shapes of models, complete training steps"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpus",
        default="0",
        help="those that share a row, of the visible GPUs, counted from 0: 0 or 0,1",
    )
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *SMOKE], default=None)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="the first is not timed; two of whole models in rows over 100,000 tokens",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="where a step's GPU time goes (system ours); its traces go to --out",
    )
    parser.add_argument("--together", action="store_true", help="Python starts once for all rows")
    parser.add_argument("--after", type=Path, help="begin when there is such a file (--together)")
    parser.add_argument("--sharding", default="auto", choices=("auto", "ddp", "fsdp2"))
    parser.add_argument("--each", type=float, default=90, help="seconds for one measurement")
    parser.add_argument("--limit", type=float, default=240, help="seconds for the whole command")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--scratch", type=Path, default=None, help="where models are written")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it run?")
    parser.add_argument("--render", type=Path, nargs="*", default=None, help="results to merge")
    args = parser.parse_args()
    if args.render is not None:
        for path in args.render:
            found = results_of(path)
            about = {k: v for k, v in found.items() if k != "results"}
            table = write(args.out, "models", TITLE, render, found["results"], about)
            print(table)
        return 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        return measure(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
