"""Attention kernels at the heads and masks of today's models: forward and backward of one row on one
GPU, each kernel beside the one that `attention_backend: auto` takes.

    python benchmarks/kernels.py --out benchmarks/results      # one GPU, under four minutes
    python benchmarks/kernels.py --smoke                       # tiny shapes on the CPU: does it run?

Heads: those of Gemma 3 (256), Gemma 2 (256, scores soft-capped at 50), DeepSeek (192 for queries and
keys, 128 for values), gpt-oss (64, eight queries to a key; `sinks`: what the engine does with them,
outside of the kernels) and Qwen3 (128). Masks: causal, causal in a sliding window, packed documents,
and rows of documents of one length (where calls of their own begin to pay). Every
kernel of the engine is called on the whole mask as one tile; on packed documents
also one call a document (`a call each`), the only form that some have. A kernel that the engine's
rules refuse is tried all the same: what the table shows is what it does, beside why it is refused.
`engine` is what a run gets: tiles cut and chosen by `auto`, with everything around the kernels.
flex_attention is compiled for the mask.

TFLOP/s of forward and backward together: 2 * pairs * heads * (D + Dv), 3.5 times, over the median of
several runs. `error` is the largest relative root mean square error of out, dq, dk and dv from
float64 at a short length; a kernel that is off by more than its type allows has no part in `best`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
from _table import command_line, machine_name  # noqa: E402
from longfactory import sp  # noqa: E402
from longfactory.sp import backends  # noqa: E402
from longfactory.sp.backends.selftest import TOLERANCE  # noqa: E402
from longfactory.sp.distance import worst  # noqa: E402
from longfactory.sp.tiles import Tile  # noqa: E402


class Case(NamedTuple):
    """`window`: keys that a query sees, itself included. `shares`: of the row, by document.
    `few`: only what `auto` chooses between is measured. `sinks`: of the engine alone."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    window: int | None = None
    shares: tuple[int, ...] | None = None
    few: bool = False
    softcap: float | None = None
    sinks: bool = False


PACKED = (300, 5, 200, 120, 60, 250, 65)  # thousandths of the row
DOCUMENTS = (512, 1024, 2048, 4096)  # tokens of each in a row of 32,768
MODELS = {
    "Gemma 3": (16, 8, 256, 256),
    "DeepSeek": (16, 16, 192, 128),
    "gpt-oss": (64, 8, 64, 64),
    "Qwen3": (32, 4, 128, 128),
}
WINDOWS = {"Gemma 3": 1024, "gpt-oss": 128, "Qwen3": 4096}
CASES = (
    [
        case
        for model, heads in MODELS.items()
        for case in (
            Case(f"{model}, causal", *heads),
            *((Case(f"{model}, window", *heads, WINDOWS[model]),) if model in WINDOWS else ()),
            Case(f"{model}, packed", *heads, None, PACKED),
            *(
                (Case(f"{model}, packed, window", *heads, WINDOWS[model], PACKED),)
                if model in ("Gemma 3", "gpt-oss")
                else ()
            ),
        )
    ]
    + [
        Case("Gemma 2, causal", 16, 8, 256, 256, softcap=50.0),
        Case("Gemma 2, window", 16, 8, 256, 256, 4096, softcap=50.0),
        Case("Gemma 2, packed", 16, 8, 256, 256, None, PACKED, softcap=50.0),
        Case("gpt-oss, causal, sinks", 64, 8, 64, 64, sinks=True),
        Case("gpt-oss, window, sinks", 64, 8, 64, 64, 128, sinks=True),
    ]
    + [
        Case(f"{model}, documents of {tokens:,}", *heads, None, (1,) * (32768 // tokens), True)
        for model, heads in MODELS.items()
        for tokens in DOCUMENTS
    ]
)
Timed = Callable[[], Any]
Both = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]
"""(q, k, v, dout), each [T, H, D] -> out, dq, dk, dv"""


def documents(case: Case, length: int) -> tuple[int, ...]:
    """Where documents begin, and the length. Each a multiple of nothing in particular."""
    if case.shares is None:
        return (0, length)
    whole = sum(case.shares)
    ends = [length * end // whole + 1 for end in itertools.accumulate(case.shares)]
    return (0, *ends[:-1], length)


def inputs(case: Case, length: int, device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    sizes = (
        (case.heads, case.dim),
        (case.kv_heads, case.dim),
        (case.kv_heads, case.value_dim),
        (case.heads, case.value_dim),
    )
    return [
        torch.randn(length, *size, generator=generator, device=device, dtype=dtype)
        for size in sizes
    ]


# ---- kernels -------------------------------------------------------------------------------------


def whole_tile(case: Case, length: int) -> Tile:
    cu = documents(case, length)
    rows = slice(0, length)
    window = None if case.window is None else case.window - 1  # the bound at the left
    if case.shares is None:
        return Tile(rows, rows, "causal", window=window)
    return Tile(rows, rows, "varlen", cu, window)


def of_backend(backend: Any, case: Case, length: int) -> Both:
    """A kernel of the engine on the whole mask as one tile."""
    tile, scale = whole_tile(case, length), case.dim**-0.5

    def both(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        out, lse = backend.forward(q, k, v, tile, scale, case.softcap)
        return [out, *backend.backward(dout, q, k, v, out, lse, tile, scale, case.softcap)]

    return both


def a_call_each(backend: Any, case: Case, length: int) -> Both:
    """A kernel of the engine, one call for each document."""
    cu, scale = documents(case, length), case.dim**-0.5

    def both(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        parts = []
        for a, b in itertools.pairwise(cu):
            rows = slice(0, b - a)
            window = None if case.window is None else case.window - 1
            tile = Tile(rows, rows, "causal", window=window)
            out, lse = backend.forward(q[a:b], k[a:b], v[a:b], tile, scale, case.softcap)
            grads = backend.backward(
                dout[a:b], q[a:b], k[a:b], v[a:b], out, lse, tile, scale, case.softcap
            )
            parts.append((out, *grads))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    return both


def of_engine(case: Case, length: int, device: str) -> Both:
    ctx = sp.SequenceParallel.create(1, device_type=device)
    segments = [sp.Segment(a, b) for a, b in itertools.pairwise(documents(case, length))]
    plan = sp.plan(length, segments, ctx)

    def both(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        more = {"window": case.window, "softcap": case.softcap, "sinks": sinks_of(case, q)}
        out, lse = sp.attention_forward(q, k, v, plan, **more)
        grads = sp.attention_backward(dout, q, k, v, out, lse, plan, **more)
        return [out, *grads[:3]]

    return both


def sinks_of(case: Case, q: Tensor) -> Tensor | None:
    """Of each head, in the type that a model in half precision has."""
    if not case.sinks:
        return None
    return torch.linspace(-2, 2, case.heads, device=q.device).to(q.dtype)


def of_flex(case: Case, length: int, device: str) -> Both:
    """flex_attention with a mask of blocks, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cu = torch.tensor(documents(case, length)[1:], device=device)
    document = torch.bucketize(torch.arange(length, device=device), cu, right=True)
    window, packed = case.window, case.shares is not None

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = i >= j
        if window is not None:
            keep = keep & (i - j < window)
        return keep & (document[i] == document[j]) if packed else keep

    mask = create_block_mask(seen, None, None, length, length, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        assert case.softcap is not None
        return case.softcap * torch.tanh(score / case.softcap)

    change = None if case.softcap is None else capped

    def both(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        # [T, H, D] -> [1, H, T, D]
        batched = [x.transpose(0, 1).unsqueeze(0) for x in leaves]
        out = compiled(*batched, score_mod=change, block_mask=mask, enable_gqa=True)
        out = out[0].transpose(0, 1)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return both


def refusal(backend: Any, case: Case, length: int, q: Tensor, v: Tensor) -> str | None:
    request = backends.request_for(whole_tile(case, length), q, v, case.softcap)
    return backend.refuses(request)  # type: ignore[no-any-return]


def picked(case: Case, length: int, q: Tensor, v: Tensor) -> str:
    """What `auto` takes for the whole mask as one tile."""
    request = backends.request_for(whole_tile(case, length), q, v, case.softcap)
    return backends.resolve("auto", request)[0]


# ---- measuring -----------------------------------------------------------------------------------


def pairs(case: Case, length: int) -> float:
    total = 0.0
    for a, b in itertools.pairwise(documents(case, length)):
        n = b - a
        w = min(case.window or n, n)
        total += w * (w + 1) / 2 + (n - w) * w
    return total


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Timed, device: str, repeats: int) -> float:
    work()  # compiles, and plans shapes
    synchronize(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def exact(case: Case, length: int, device: str) -> list[Tensor]:
    wide = [x.double() for x in inputs(case, length, device)]
    if case.sinks:
        return with_sinks(case, *wide)
    return of_backend(backends.BACKENDS["math"], case, length)(*wide)


def with_sinks(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """The softmax over a head's scores and its sink, whose column is left out then."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    # [T, H, D] -> [H, T, D]
    query, key, value = (x.transpose(0, 1) for x in leaves)
    group = case.heads // case.kv_heads
    key, value = (x.repeat_interleave(group, 0) for x in (key, value))
    mask = whole_tile(case, len(q)).mask().to(q.device)
    scores = (query @ key.transpose(1, 2) * case.dim**-0.5).masked_fill(~mask, -torch.inf)
    sinks = sinks_of(case, inputs(case, 1, str(q.device.type))[0])
    assert sinks is not None
    column = sinks.to(q.dtype)[:, None, None].expand(-1, len(q), 1)
    shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out = (shares @ value).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error_of(both: Both, case: Case, length: int, device: str, expected: list[Tensor]) -> float:
    found = both(*inputs(case, length, device))
    return worst((a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))


def candidates(case: Case, length: int, device: str) -> dict[str, Callable[[int], Both]]:
    """Name -> for a length, what computes."""
    found: dict[str, Callable[[int], Both]] = {
        "engine": functools.partial(of_engine, case, device=device)
    }
    names = (
        ("cpu",)
        if device == "cpu"
        else ("fa4", "flash3", "cudnn", "flash2", "flash", "efficient", "triton")
    )
    if case.softcap is None:
        names = tuple(name for name in names if name != "triton")
    if case.sinks:
        return found
    if case.few:
        names = ("cpu",) if device == "cpu" else ("cudnn", "flash")
    for name in names:
        backend = backends.BACKENDS[name]
        if name != "cudnn" or case.shares is None:
            found[name] = functools.partial(of_backend, backend, case)
        elif case.window is None and case.softcap is None:  # it has neither
            found[f"{name}, a call each"] = functools.partial(a_call_each, backend, case)
    if device == "cuda" and not case.few:
        found["flex_attention"] = functools.partial(of_flex, case, device=device)
    return found


def measure(case: Case, name: str, make: Callable[..., Both], args: Any) -> dict[str, Any]:
    """One row: a kernel on a case."""
    device = args.device
    row: dict[str, Any] = {"case": case.name, "kernel": name}
    q, k, v, dout = inputs(case, args.length, device)
    backend = backends.BACKENDS.get(name.partition(",")[0])
    if backend is not None:
        reason = refusal(backend, case, args.length, q, v)
        if reason is not None:
            row["refused"] = reason
            if reason.startswith(("is not", "cannot be", "runs on")):
                return row
            if case.window is not None and "window" in reason:
                return row  # it would compute another mask
            if case.softcap is not None and "soft-cap" in reason:
                return row
    short = args.short
    row["error"] = error_of(make(short), case, short, device, exact(case, short, device))
    if row["error"] > TOLERANCE[q.dtype]:
        return {**row, "failed": f"its error is {row['error']:.1e}"}
    both = make(args.length)
    seconds = seconds_of(lambda: both(q, k, v, dout), device, args.repeats)
    work = 3.5 * 2.0 * pairs(case, args.length) * case.heads * (case.dim + case.value_dim)
    row["ms"], row["tflops"] = seconds * 1e3, work / seconds / 1e12
    if name == "engine":
        row["auto"] = picked(case, args.length, q, v)
    return row


def attempt(case: Case, name: str, make: Callable[..., Both], args: Any) -> dict[str, Any]:
    try:
        row = measure(case, name, make, args)
    except Exception as error:  # the other rows go on
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        row = {"case": case.name, "kernel": name, "failed": f"{type(error).__name__}: {lines[0]}"}
        row["failed"] = row["failed"][:200]
    if args.device == "cuda":
        torch.cuda.empty_cache()
    print(json.dumps(row), flush=True)
    return row


def render(rows: list[dict[str, Any]]) -> str:
    """A table for each case, and one line a case at the top."""
    cases = list(dict.fromkeys(r["case"] for r in rows))
    head = [
        "| heads and mask | auto takes | engine, TFLOP/s | best kernel | TFLOP/s | share of the best |",
        "|---|---|---|---|---|---|",
    ]
    body = [
        "",
        "| heads and mask | kernel | TFLOP/s | ms | error | the engine's rule |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        own = [r for r in rows if r["case"] == case]
        ran = [r for r in own if "tflops" in r and r["kernel"] != "engine"]
        engine = next((r for r in own if r["kernel"] == "engine" and "tflops" in r), None)
        if ran and engine:
            best = max(ran, key=lambda r: float(r["tflops"]))
            share = engine["tflops"] / best["tflops"]
            head.append(
                f"| {case} | {engine['auto']} | {engine['tflops']:.0f} | {best['kernel']} |"
                f" {best['tflops']:.0f} | {share:.2f} |"
            )
        elif engine:
            head.append(f"| {case} | {engine['auto']} | {engine['tflops']:.0f} | | | |")
        for r in own:
            start = f"| {case} | {r['kernel']} |"
            rule = r.get("refused", "")
            if "tflops" in r:
                body.append(
                    f"{start} {r['tflops']:.0f} | {r['ms']:.2f} | {r['error']:.1e} | {rule} |"
                )
            else:
                body.append(f"{start} {r.get('failed', '')} | | | {rule} |")
    return "\n".join(head + body) + "\n"


def write(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    facts = ", ".join(f"{k}: {v}" for k, v in about.items())
    text = f"# Attention kernels by heads and mask\n\n{facts}\n\n{render(rows)}"
    (out / "kernels.md").write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--short", type=int, default=1280, help="length that errors are taken at")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=220, help="seconds; no row begins later")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.device = "cpu" if args.smoke else "cuda"
    if args.smoke:
        args.length, args.short, args.repeats = 512, 256, 1
    end = time.time() + args.limit
    about = {
        "device": machine_name(),
        "length": args.length,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    rows: list[dict[str, Any]] = []
    cases = [case for case in CASES if args.only in case.name]
    # flex_attention, which is compiled for each mask, comes last
    for compiled in (False, True):
        for case in cases:
            for name, make in candidates(case, args.length, args.device).items():
                if (name == "flex_attention") is not compiled or time.time() > end:
                    continue
                rows.append(attempt(case, name, make, args))
            if compiled or case is cases[-1] or not args.smoke:
                write(args.out, rows, about)
    print(render(rows))
    return int(args.smoke and any("failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
