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
import collections
import concurrent.futures
import contextlib
import importlib
import itertools
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A process that has asked the driver for its GPUs cannot be forked: NVML is asked.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _parts import table as parts_table
from _table import command_line, machine_name
from longfactory import cli, sp
from longfactory.sp.recurrent import computed
from longfactory.sp.recurrent.chunked import recurrence
from longfactory.sp.recurrent.convolution import convolution
from longfactory.sp.recurrent.fragments import fragments_of
from longfactory.sp.recurrent.rule import Rule
from make_model import make_model

ROOT = Path(__file__).resolve().parent.parent
# kind, key heads, heads, key dim, value dim, channels of the convolution
SHAPES: dict[str, tuple[str, int, int, int, int, int]] = {
    "Qwen3.5-9B gated delta net": ("delta", 16, 32, 128, 128, 8192),
    "Kimi Linear": ("channels", 32, 32, 128, 128, 12288),
    "Nemotron-H-8B Mamba 2": ("plain", 8, 128, 128, 64, 10240),
    "Granite-4-H-small Mamba 2": ("plain", 1, 128, 128, 64, 8448),
    "Granite-4-H-tiny Mamba 2": ("plain", 1, 48, 128, 64, 3328),
}
TINY: dict[str, tuple[str, int, int, int, int, int]] = {
    "tiny delta": ("delta", 1, 2, 16, 32, 64),
    "tiny channels": ("channels", 2, 2, 16, 16, 64),
    "tiny plain": ("plain", 1, 2, 16, 16, 64),
}
NAMES = ("q", "k", "v", "g", "beta")


def inputs(shape: tuple[Any, ...], tokens: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    kind, keys, heads, dim, value_dim, _ = shape
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device)

    q, k = normal(tokens, keys, dim), normal(tokens, keys, dim)
    v = normal(tokens, heads, value_dim)
    size = (heads, dim) if kind == "channels" else (heads,)
    rate = torch.exp(-2 + 1.5 * normal(*size))
    g = -rate * torch.nn.functional.softplus(normal(tokens, *size) - 2)
    beta = torch.sigmoid(normal(tokens, heads))
    if kind == "plain":
        q, k = q / dim**0.25, k / dim**0.25
        beta = torch.nn.functional.softplus(normal(tokens, heads) - 2)
        return [q.to(dtype), k.to(dtype), v.to(dtype), -rate * beta, beta]
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta.to(dtype)]


def rule_of(shape: tuple[Any, ...]) -> Rule:
    return (
        Rule("plain", 1.0)
        if shape[0] == "plain"
        else Rule("delta", shape[3] ** -0.5, normalize=True)
    )


def ours(shape: tuple[Any, ...], plan: sp.RowPlan) -> Callable[..., Tensor]:
    dtype = torch.float32 if shape[0] == "plain" else None

    def run(*x: Tensor) -> Tensor:
        return recurrence(*x, rule_of(shape), fragments_of(plan), None, dtype)

    return run


def theirs(shape: tuple[Any, ...], ends: list[int]) -> Callable[..., Tensor]:
    """transformers' own function, document by document."""
    kind = shape[0]

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out = []
        for a, b in zip([0, *ends], ends, strict=False):
            part = [x[None, a:b] for x in (q, k, v, g, beta)]
            if kind == "plain":
                code = importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h")
                A = (g[0] / beta[0]).detach()  # decays are A dt, and dt is beta
                scanned = code.mamba2_chunk_scan(
                    part[2], part[4], A, part[1], part[0], chunk_size=128
                )
                out.append(scanned[0])
                continue
            repeats = v.shape[1] // k.shape[1]
            part[:2] = [x.repeat_interleave(repeats, 2) for x in part[:2]]
            name = (
                "qwen3_next.modeling_qwen3_next" if kind == "delta"
                else "kimi_linear.modeling_kimi_linear"
            )  # fmt: skip
            code = importlib.import_module(f"transformers.models.{name}")
            function = (
                code.torch_chunk_gated_delta_rule if kind == "delta"
                else code.chunk_kimi_delta_attention
            )  # fmt: skip
            part_out, _ = function(
                *part[:3], g=part[3], beta=part[4], initial_state=None, output_final_state=False,
                use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            out.append(part_out[0])
        return torch.cat(out)

    return run


def graded(run: Callable[..., Tensor], x: list[Tensor], slope: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in x]
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, slope.to(out.dtype), allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Norms of the errors over those of the results, of the output and of the inputs' gradients."""
    pairs = zip(("out", *NAMES), found, exact, strict=False)
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}


def correctness(
    name: str, shape: tuple[Any, ...], device: str, dtype: torch.dtype, tokens: int
) -> dict[str, Any]:
    kind, keys, heads, dim, value_dim, channels = shape
    heads = min(heads, 4 * max(1, heads // keys))
    keys = max(1, min(keys, 4))
    shape = (kind, keys, heads, dim, value_dim, channels)
    ends = [1, tokens // 3, tokens // 3 + 1, tokens]
    plan = plan_of(ends, device)
    x = inputs(shape, tokens, device, dtype)
    slope = torch.randn(tokens, heads, value_dim, device=device).to(dtype)
    exact = graded(ours(shape, plan), [t.double() for t in x], slope.double())
    row: dict[str, Any] = {"what": "errors", "shape": name, "dtype": str(dtype)[6:]}
    for who, run in (("ours", ours(shape, plan)), ("transformers", theirs(shape, ends))):
        try:
            found = graded(run, x, slope)
            # transformers' Mamba 2 takes its decays from dt: g has no gradient of its own there
            pairs = zip(("out", *NAMES[: len(found) - 1]), found, exact, strict=False)
            if len(found) < len(exact):
                pairs = zip(("out", "q", "k", "v"), found, exact, strict=False)
            row[who] = {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in pairs}
        except Exception as error:
            row[who] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return row


def plan_of(ends: list[int], device: str) -> sp.RowPlan:
    ctx = sp.SequenceParallel(device_type=device)
    starts = [0, *ends[:-1]]
    segments = [sp.Segment(a, b) for a, b in zip(starts, ends, strict=True)]
    return sp.plan(ends[-1], segments, ctx)


def milliseconds(run: Callable[[], Any], device: str, times: int = 3) -> float:
    run()
    found = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def speed(
    name: str, shape: tuple[Any, ...], device: str, tokens: int, documents: int, own: bool
) -> dict[str, Any]:
    ends = [tokens * (i + 1) // documents for i in range(documents)]
    plan = plan_of(ends, device)
    x = inputs(shape, tokens, device, torch.bfloat16)
    slope = torch.randn(tokens, shape[2], shape[4], device=device).bfloat16()
    run = theirs(shape, ends) if own else ours(shape, plan)
    who = "transformers" if own else "ours"
    row: dict[str, Any] = {
        "what": "recurrence", "shape": name, "who": who, "tokens": tokens, "documents": documents,
    }  # fmt: skip
    first = time.perf_counter()
    with torch.no_grad():
        run(*x)
    _wait(device)
    row["first call s"] = time.perf_counter() - first
    first = time.perf_counter()
    graded(run, x, slope)
    _wait(device)
    row["first backward s"] = time.perf_counter() - first
    with torch.no_grad():
        row["forward ms"] = milliseconds(lambda: run(*x), device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row["both ms"] = milliseconds(lambda: graded(run, x, slope), device)
    if device == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if not own:
            row["kernels ms"] = kernels(lambda: graded(run, x, slope))
    return row


def kernels(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the kernels that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    total: collections.Counter[str] = collections.Counter()
    for event in seen.key_averages():
        total[event.key[:60]] += event.device_time_total / 1e3
    return {key: round(ms, 2) for key, ms in total.most_common(14)}


def convolving(
    name: str, shape: tuple[Any, ...], device: str, tokens: int, documents: int
) -> dict[str, Any]:
    channels = shape[5]
    plan = plan_of([tokens * (i + 1) // documents for i in range(documents)], device)
    draw = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(*size, generator=draw, device=device).bfloat16()
        for size in ((tokens, channels), (channels, 4))
    )
    slope = torch.randn_like(x)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, weight, None, "silu", fragments_of(plan))

    row: dict[str, Any] = {
        "what": "convolution", "shape": name, "tokens": tokens, "documents": documents,
    }  # fmt: skip
    with torch.no_grad():
        row["forward ms"] = milliseconds(lambda: run(x, weight), device)
    row["both ms"] = milliseconds(lambda: graded(run, [x, weight], slope), device)
    if device == "cuda":
        row["kernels ms"] = kernels(lambda: graded(run, [x, weight], slope))
    # float64 on fewer tokens, with which `run` goes on
    plan = plan_of([tokens // 32 * (i + 1) // documents for i in range(documents)], device)
    x, slope = x[: tokens // 32], slope[: tokens // 32]
    exact = graded(run, [x.double(), weight.double()], slope.double())
    found = graded(run, [x, weight], slope)
    row["errors"] = {
        n: ((a.double() - b).norm() / b.norm()).item()
        for n, a, b in zip(("out", "x", "weight"), found, exact, strict=True)
    }
    return row


def shown(row: dict[str, Any]) -> str:
    parts = []
    for key, value in row.items():
        if isinstance(value, dict):
            inner = ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
            )
            parts.append(f"\n    {key}: {inner}")
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)


def run_kernels(a: argparse.Namespace, clock: float) -> list[dict[str, Any]]:
    device = "cpu" if a.smoke else "cuda"
    shapes = TINY if a.smoke else SHAPES
    if a.only:
        shapes = {k: v for k, v in shapes.items() if any(part in k for part in a.only)}
    long, short = (256, 200) if a.smoke else (32768, 2048)
    jobs: list[Callable[[], dict[str, Any]]] = []
    for name, shape in shapes.items():
        jobs.append(lambda n=name, s=shape: correctness(n, s, device, torch.bfloat16, short))
    if not a.smoke:
        jobs.append(lambda: correctness(*first(shapes), device, torch.float32, short))
    for name, shape in shapes.items():
        for documents in (1, 4):
            jobs.append(
                lambda n=name, s=shape, d=documents: speed(n, s, device, long, d, own=False)
            )
        jobs.append(lambda n=name, s=shape: convolving(n, s, device, long, 4))
    for name, shape in shapes.items():
        if shape[0] != "channels":
            # transformers' Mamba 2 makes 8 GiB of every 1,024 tokens of such a layer
            tokens = long // 4 if shape[0] == "delta" else long // 32
            jobs.append(lambda n=name, s=shape, t=tokens: speed(n, s, device, t, 1, own=True))
    if not a.smoke:
        jobs.insert(len(shapes) + 2, lambda: by_pytorch(*first(shapes), device, long))
    rows: list[dict[str, Any]] = []
    for job in jobs:
        if time.time() > clock:
            print("The time of this command is up.", flush=True)
            break
        try:
            row = job()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        rows.append(row)
        print(shown(row), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def first(shapes: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
    return next(iter(shapes.items()))


def by_pytorch(name: str, shape: tuple[Any, ...], device: str, tokens: int) -> dict[str, Any]:
    """The same without Triton."""
    held = computed.by_kernels
    computed.by_kernels = lambda *_: False  # type: ignore[assignment]
    try:
        return speed(name, shape, device, tokens, 1, own=False) | {"who": "ours, PyTorch"}
    finally:
        computed.by_kernels = held


VARIANTS = [None, (8, 1, 64), (4, 2, 16), (8, 2, 32), (4, 1, 64), (4, 1, 16)]
"""Warps, stages and columns of values that `tune` tries; None for the kernels' own."""


def run_tune(a: argparse.Namespace, clock: float) -> list[dict[str, Any]]:
    """Each kernel of some recurrences with other settings, the others unchanged."""
    from longfactory.sp.recurrent import chunk_kernels

    rows: list[dict[str, Any]] = []
    names = [name for name in SHAPES if not a.only or any(part in name for part in a.only)]
    for variant, name in itertools.product(VARIANTS, names):
        shape = SHAPES[name]
        before = dict(chunk_kernels.SETTINGS)
        row: dict[str, Any] = {"what": "tune", "shape": name, "settings": str(variant)}
        try:
            changed = [name for name in before if name not in ("invert", "merge")]
            if variant is not None:
                chunk_kernels.SETTINGS.update(dict.fromkeys(changed, variant))
            plan = plan_of([32768], "cuda")
            x = inputs(shape, 32768, "cuda", torch.bfloat16)
            slope = torch.randn(32768, shape[2], shape[4], device="cuda").bfloat16()
            run = ours(shape, plan)
            started = time.time()
            row["failed"] = apart(chunk_kernels, before, variant, lambda: graded(run, x, slope))
            row["first call s"] = time.time() - started
            found = kernels(lambda: graded(run, x, slope))
            row["kernels ms"] = {k: v for k, v in found.items() if k.startswith(("chunk_", "chan"))}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            chunk_kernels.SETTINGS.update(before)
        rows.append(row)
        print(shown(row), flush=True)
        if time.time() > clock:
            break
    return rows


def apart(module: Any, before: dict[str, Any], variant: Any, run: Callable[[], Any]) -> str:
    """Kernels that do not fit with these settings keep their own. Returns their names."""
    failed = []
    for _ in range(len(before) + 1):
        try:
            run()
            break
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            name = next((n for n in reversed([*before]) if f"{n}[" in text), None)
            if name is None or name in failed:
                raise
            failed.append(name)
            module.SETTINGS[name] = before[name]
    return ", ".join(failed)


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
    timed = [x for x in lines if "loss" in x][timed_steps(a.steps, traced)]
    speeds = [x["tokens_per_second_per_gpu"] for x in timed]
    return {
        "tokens/s a GPU": statistics.median(speeds),
        "of steps": len(speeds),
        "waited for rows": statistics.median(x.get("data_wait", 0.0) for x in timed),
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
