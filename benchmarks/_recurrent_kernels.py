"""The kernels of recurrent layers, alone: are they right, how fast, and with which settings. Run by
`recurrent.py kernels` and `recurrent.py tune`.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfactory import sp
from longfactory.sp.recurrent import computed
from longfactory.sp.recurrent.chunked import recurrence
from longfactory.sp.recurrent.convolution import convolution
from longfactory.sp.recurrent.fragments import fragments_of
from longfactory.sp.recurrent.rule import Rule

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
    # Heads that 16 divides: the kernels are those that `computed` has proved, not compiled anew.
    share = heads // keys
    keys = min(keys, 16 // math.gcd(16, share))
    heads = keys * share
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
    for name, shape in shapes.items():
        for documents in (1, 4):
            jobs.append(
                lambda n=name, s=shape, d=documents: speed(n, s, device, long, d, own=False)
            )
        jobs.append(lambda n=name, s=shape: convolving(n, s, device, long, 4))
    if not a.smoke:
        jobs.append(lambda: correctness(*first(shapes), device, torch.float32, short))
        jobs.append(lambda: by_pytorch(*first(shapes), device, long))
    for name, shape in shapes.items():
        if shape[0] != "channels":
            # transformers' Mamba 2 makes 8 GiB of every 1,024 tokens of such a layer
            tokens = long // 4 if shape[0] == "delta" else long // 32
            jobs.append(lambda n=name, s=shape, t=tokens: speed(n, s, device, t, 1, own=True))
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


VARIANTS = ["own", "8,1,64", "4,2,16", "8,2,32", "4,1,64", "4,1,16"]
"""Warps, stages and columns of values that `tune` tries; "own" for the kernels' own."""


def run_tune(a: argparse.Namespace, clock: float) -> list[dict[str, Any]]:
    """Each kernel of some recurrences with other settings, the others unchanged."""
    from longfactory.sp.recurrent import chunk_kernels

    # What does not fit is said, and nothing else takes its place.
    chunk_kernels.SMALLER.update(dict.fromkeys(chunk_kernels.SMALLER, ()))
    rows: list[dict[str, Any]] = []
    names = [name for name in SHAPES if not a.only or any(part in name for part in a.only)]
    for words, name in itertools.product(a.variants, names):
        shape = SHAPES[name]
        variant = None if words == "own" else tuple(int(word) for word in words.split(","))
        before = dict(chunk_kernels.SETTINGS)
        row: dict[str, Any] = {"what": "tune", "shape": name, "settings": words}
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
