"""Recurrent layers: are the kernels right, and how fast, alone and in training steps of the command.

    python benchmarks/recurrent.py kernels --out benchmarks/results     # one GPU, some three minutes
    python benchmarks/recurrent.py command --gpus 1 --out benchmarks/results
    python benchmarks/recurrent.py kernels --smoke --out results   # CPU, tiny: does it run?

`kernels` prints, for each shape: errors of the output and of every gradient from float64, as shares
of the largest value, in bf16 and beside them those of transformers' own function on the same
inputs; then milliseconds forward, and forward and backward, of one layer's recurrence and of its
convolution, of transformers' own, and of each kernel. `command` runs `longfactory train` with random
weights, and takes the median step of its log.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

# A process that has asked the driver for its GPUs cannot be forked: NVML is asked.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import psutil
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _log import step_speeds
from _parts import table as parts_table
from _recurrent_kernels import VARIANTS, run_kernels, run_tune, shown
from _table import command_line, machine_name
from longfactory import cli
from make_model import make_model

ROOT = Path(__file__).resolve().parent.parent

PHRASE = "".join(f"the quick brown fox is number {i} " for i in range(4))
MODELS: dict[str, list[tuple[int, int, dict[str, Any]]]] = {
    "qwen3.5-9b": [(32768, 1, {}), (8192, 1, {}), (8192, 4, {})],
    "qwen3.5-35b-a3b": [(65536, 1, {"pure_bf16": "true"})],
    "nemotron-h-8b": [(32768, 1, {})],
    "granite-4-h-tiny": [(32768, 1, {})],
    "tiny-hybrid": [(256, 1, {}), (64, 4, {})],
}
"""Shapes of `make_model`, and (tokens of a document, documents of a row, further keys)."""
LEAST_PROFILED = 5
"""Steps of a run from which on the last but one is profiled."""


def timed_steps(steps: int, traced: bool) -> slice:
    """Places of the steps that are timed. The first one compiles; the one before a profiled one
    warms the profiler up.
    """
    return slice(1, max(steps - 3, 2) if traced else steps)


def run_command(a: argparse.Namespace, clock: float) -> list[dict[str, Any]]:
    started = time.time()
    importlib.import_module("longfactory.train.run")
    print(f"the command's modules took {time.time() - started:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    models = ["tiny-hybrid"] if a.smoke else [name for name in MODELS if name != "tiny-hybrid"]
    with tempfile.TemporaryDirectory() as folder:
        for packed in (False, True):
            chosen = [
                (model, *row)
                for model in a.models or models
                for row in MODELS[model]
                if packed == (row[1] > 1)
            ]
            for model, tokens, documents, keys in chosen:
                name = f"{model} {documents}x{tokens}"
                if a.only and not any(part in name for part in a.only):
                    continue
                if time.time() > clock - 20:
                    print("The time of this command is up.", flush=True)
                    return rows
                row: dict[str, Any] = {"what": "step", "model": model, "gpus": a.gpus}
                row |= {"tokens": tokens * documents, "documents": documents, **keys}
                at = Path(folder) / name.replace(" ", "-")
                try:
                    row |= train(model, tokens, documents, keys, a, clock, at)
                    print(f"{model}: {row['tokens/s a GPU']:.0f} tokens/s a GPU", flush=True)
                    show_parts(at / "trace")
                    if documents == 1 and (tokens >= 32768 or a.smoke) and not a.steps_only:
                        share = against_roofline if a.gpus == 1 else against_ideal
                        try:
                            row |= share(row, at, tokens, clock, a)
                        except Exception as error:
                            row["no share"] = f"{type(error).__name__}: {error}"[-1000:]
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[-1500:]
                rows.append(row)
                print(shown(row), flush=True)
    return rows


def show_parts(folder: Path) -> None:
    """Prints where the time of the first process's profiled step went."""
    for trace in sorted(folder.glob("*.json"))[:1]:
        try:
            print(parts_table(trace), flush=True)
        except Exception as error:
            print(f"the trace: {type(error).__name__}: {error}", flush=True)


def train(
    model: str,
    tokens: int,
    documents: int,
    further: dict[str, Any],
    a: argparse.Namespace,
    clock: float,
    at: Path,
) -> dict[str, Any]:
    """Steps of `longfactory train` on rows of `documents` documents of `tokens` tokens."""
    make_model(model, at / "model")
    ids = at / "data"
    ids.mkdir()
    # Documents a little shorter than `tokens`, so that a packed row has all of them.
    phrase = len(AutoTokenizer.from_pretrained(at / "model")(PHRASE).input_ids)
    repeats = max(1, (tokens * a.gpus - 16) // phrase)
    line = json.dumps({"text": PHRASE * repeats})
    (ids / "rows.jsonl").write_text(f"{line}\n" * (documents * (a.steps + 1)))
    (ids / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}})
    )
    keys = {
        "model_name_or_path": at / "model",
        "train_from_scratch": "true",
        "stage": "pt",
        "finetuning_type": "full",
        "dataset": "rows",
        "dataset_dir": ids,
        "cutoff_len": tokens * documents * a.gpus,
        "packing": "true",
        "sequence_parallel_size": a.gpus,
        "nproc_per_node": a.gpus,
        "output_dir": at / "out",
        "overwrite_output_dir": "true",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "max_steps": a.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": "true",
        "memory": "auto",
        "report_to": "none",
        "use_cpu": str(a.smoke).lower(),
        **further,
    }
    traced = a.trace and a.steps >= LEAST_PROFILED
    if traced:
        keys |= {
            "enable_torch_profiler": "true",
            "profiler_output_dir": at / "trace",
            "profiler_wait_steps": a.steps - 3,
            "profiler_warmup_steps": 1,
            "profiler_record_shapes": "false",
            "profiler_profile_memory": "false",
        }
    if keys.get("pure_bf16"):
        del keys["bf16"]
    words = ["train", *(f"{key}={value}" for key, value in keys.items())]
    started = time.time()
    # What comes after the last step is not waited for: writing the model takes up to 20 s.
    status, text = forked(words, visible_gpus(a.gpus), clock, f"step {a.steps}/{a.steps}:")
    log = at / "out" / "trainer_log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    if status is None or status or not lines:
        why = "the time is up" if status is None else f"exit status {status}"
        raise RuntimeError(f"{why}, after {len(lines)} lines of its log: {text[-1500:]}")
    lines = [json.loads(line) for line in lines]
    plan = re.search(r"Memory plan.*\n +(.*)", text)
    timed = timed_steps(a.steps, traced)
    speeds = step_speeds(lines)[timed.start - 1 : timed.stop - 1]
    rows = [x for x in lines if "loss" in x][timed]
    return {
        "tokens/s a GPU": statistics.median(speeds),
        "of steps": len(speeds),
        "waited for rows": statistics.median(x.get("data_wait", 0.0) for x in rows),
        "seconds of the command": time.time() - started,
        "settings": plan[1] if plan else "",
        "last line": lines[-1],
        "said": _said(text),
    }


def measured_rates(at: Path, tokens: int, clock: float, gpus: int, device: int) -> dict[str, Any]:
    """What one GPU reaches at the shapes of a model, in a process of its own.

    Raises:
        RuntimeError: nothing was measured.
    """
    job = {
        "row": "rates", "tokens": [tokens], "lengths": sorted({tokens, tokens * gpus}),
        "lora": False, "kernel": "auto", "model": str(at / "model"),
    }  # fmt: skip
    script = ROOT / "benchmarks" / "_model_rows.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps({**job, "jobs": [job]})],
        capture_output=True,
        text=True,
        timeout=max(10.0, clock - time.time()),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": visible_gpus(device + 1)[device]},
    )
    found = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not found:
        raise RuntimeError((done.stdout + done.stderr)[-500:])
    rates: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    if "error" in rates:
        raise RuntimeError(rates["error"])
    return rates


def visible_gpus(count: int) -> list[str]:
    """The first GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count]


def forked(words: list[str], gpus: list[str], clock: float, last: str) -> tuple[int | None, str]:
    """Runs the command in a process that has its modules already: imports take 10 to 30 s. Prints
    its lines as they come, with seconds since its start.

    Args:
        last: part of a line after which it is stopped; "" for none.
    Returns:
        Its exit status (0 if stopped after that line), None where it was stopped since the time was
        up, and what it printed.
    """
    read, write = os.pipe()
    started = time.time()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            path = os.environ.get("PYTHONPATH", "")
            os.environ["PYTHONPATH"] = f"{ROOT / 'src'}:{path}"
            sys.argv = ["longfactory", *words]
            status = cli.main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    found: list[str] = []
    reached = False
    with os.fdopen(read, errors="replace") as given:
        stop = threading.Timer(max(1.0, clock - time.time()), lambda: end(child))
        stop.start()
        for line in given:
            found.append(line)
            if last and last in line:
                time.sleep(1.0)  # for its log file
                stop.cancel()
                end(child)
                reached = True
            if line.strip() and "%|" not in line and "    [[" not in line:
                print(f"  {time.time() - started:5.1f} {line.rstrip()[:220]}", flush=True)
        stop.cancel()
    status = os.waitpid(child, 0)[1]
    if reached:
        return 0, "".join(found)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
    return None if killed else os.waitstatus_to_exitcode(status), "".join(found)


def end(process: int) -> None:
    """Kills a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        for each in [*first.children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def against_roofline(
    row: dict[str, Any], at: Path, tokens: int, clock: float, a: argparse.Namespace
) -> dict[str, Any]:
    """The share of its roofline (`models.py`) that a row of one document reaches, and its parts.
    A recurrence and its convolution have the time of their operations at the rate of the layers'
    products: no bytes are counted for them.
    """
    from transformers import AutoModelForCausalLM

    from _model_rows import make_config
    from longfactory.memory.layer_kinds import kinds_of
    from models import roofline
    from plan_accuracy import Setting

    # Attention of twice the length too, which the ideal of two GPUs wants.
    rates = measured_rates(at, tokens, clock, 2 if tokens <= 32768 else 1, 0)
    said = row["settings"]
    made = roofline(Setting("", None, tokens, {"finetuning_type": "full"}), 1, rates, said)
    config = make_config(str(at / "model"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    flop = sum(kind.recurrent_flop for kind in kinds_of(model, config))
    again = 0.0 if "every activation stored" in said else 1.0
    made["recurrences"] = (3 + again) * tokens * flop / rates["gemm"]
    share = sum(made.values()) * row["tokens/s a GPU"] / tokens
    return {
        "share of its roofline": share,
        "roofline s": {k: round(v, 4) for k, v in made.items()},
        "attention": rates["attention"],
    }


def against_ideal(
    row: dict[str, Any], at: Path, tokens: int, clock: float, a: argparse.Namespace
) -> dict[str, Any]:
    """The share of the attention-corrected ideal (`models.py`): from a run on one GPU with as many
    tokens, while another one measures the rates of attention.
    """
    if a.alone is not None and a.alone.is_file():
        rows = json.loads(a.alone.read_text())["rows"]
        one = next(r for r in rows if r["model"] == row["model"] and r["tokens"] == tokens)
        return of_ideal(row, tokens, a.gpus, one, {"attention": one["attention"]})
    alone = argparse.Namespace(gpus=1, steps=a.steps, smoke=a.smoke, trace=False)
    keys = {k: v for k, v in row.items() if k == "pure_bf16"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        rates = pool.submit(measured_rates, at, tokens, clock, a.gpus, a.gpus - 1)
        one = train(row["model"], tokens, 1, keys, alone, clock, at.with_name(at.name + "-alone"))
        return of_ideal(row, tokens, a.gpus, one, rates.result())


def of_ideal(
    row: dict[str, Any], tokens: int, gpus: int, one: dict[str, Any], rates: dict[str, Any]
) -> dict[str, Any]:
    from models import ideal
    from plan_accuracy import Setting

    setting = Setting("", None, tokens, {"finetuning_type": "full"})
    seconds = {"seconds": tokens / one["tokens/s a GPU"]}
    best = ideal(setting, gpus, rates, seconds, row["settings"])
    return {
        "tokens/s on one GPU": one["tokens/s a GPU"],
        "settings on one GPU": one["settings"],
        "attention s by tokens": {k: sum(v.values()) for k, v in rates["attention"].items()},
        "ideal tokens/s": best,
        "share of the ideal": row["tokens/s a GPU"] / best,
    }


def run_fla(a: argparse.Namespace, clock: float) -> list[dict[str, Any]]:
    """flash-linear-attention's gated delta rule from each of some folders, side by side."""
    script = ROOT / "benchmarks" / "_fla.py"
    command = [sys.executable, "-u", str(script)] + (["--smoke"] if a.smoke else [])
    jobs = [
        subprocess.Popen(
            [*command, str(package)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for package in a.packages or [Path()]
    ]
    rows: list[dict[str, Any]] = []
    for job, package in zip(jobs, a.packages or [Path()], strict=True):
        try:
            text, _ = job.communicate(timeout=max(1.0, clock - time.time()))
        except subprocess.TimeoutExpired:
            job.kill()
            text = job.communicate()[0] + "\nThe time is up."
        print(f"---- {package}\n{text[-4000:]}", flush=True)
        rows += [json.loads(x[7:]) for x in text.splitlines() if x.startswith("RESULT ")]
    return rows


def _said(text: str) -> list[str]:
    return [line for line in text.splitlines() if "recurrent" in line or "memory" in line][-6:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["kernels", "tune", "command", "fla"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=6, help="with 5 or more, the last but one is profiled"
    )
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="none is profiled")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=None)
    parser.add_argument("--only", nargs="+", help="parts of rows' names, as 8192 or 4x8192")
    parser.add_argument("--steps-only", action="store_true", help="no roofline and no ideal")
    parser.add_argument("--alone", type=Path, help="the file of `--gpus 1` for the ideal")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, help="`tune`: warps,stages,columns of kernels"
    )
    parser.add_argument("--packages", nargs="+", type=Path, help="folders of `fla` packages")
    parser.add_argument("--limit", type=float, default=200, help="seconds (default 200)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    clock = time.time() + a.limit
    parts = {"kernels": run_kernels, "tune": run_tune, "command": run_command, "fla": run_fla}
    rows = parts[a.part](a, clock)
    if a.out is not None:
        a.out.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine_name(), "command": command_line(), "rows": rows}
        name = f"recurrent_{a.part}_{a.gpus}"
        (a.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
