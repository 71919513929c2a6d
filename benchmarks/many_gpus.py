"""Sequence parallelism over the GPUs of one machine: attention, scaling, data parallel, parity.

    python benchmarks/many_gpus.py --gpus 4 --part attention --out benchmarks/results
    python benchmarks/many_gpus.py --gpus 4 --part scaling --out benchmarks/results
    python benchmarks/many_gpus.py --smoke --part attention     # two CPU processes, tiny shapes

Each part is one command of less than 10 minutes, bounded by `--limit`, and writes
many_gpus_PART_NxGPU.json and .md into `--out`; with it, rows that were measured before stay unless
they are measured again.

attention  every schedule, and `auto`, on documents of 64k to 1M tokens and on packed rows, head
           dims 128, 256 and 192/128; TFLOP/s a GPU, over one GPU's kernel at the same work, and the
           exchange: NCCL's kernels (with waiting for other ranks) and what of them no other kernel
           hides
scaling    Qwen2.5-7B's shape through `longfactory train`, all parameters, 32,768 local tokens, SP
           1, 2, 4, ...; tokens/s a GPU over the attention-corrected ideal 1 / (t1 - a1 + a2): t1 the
           time of a token at SP 1, a1 and a2 attention's at the local and at the whole length, by
           the kernel's rates of the same run
data       DP x SP through the command at the same samples a step: tokens/s and losses
parity     20 steps of a 0.5B shape in bf16: SP's distance from the float32 curve beside one GPU's
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import attention as bench  # noqa: E402
from _table import command_line, machine_name  # noqa: E402
from longfactory import sp  # noqa: E402
from longfactory.sp.measure import Measure, forward_backward  # noqa: E402
from longfactory.sp.plan import RowPlan  # noqa: E402
from longfactory.sp.schedules.choose import candidates, choice_of  # noqa: E402
from make_model import SHAPES, make_model  # noqa: E402
from per_document_zigzag import attention_pairs  # noqa: E402
from sp_training import make_data  # noqa: E402

Row = dict[str, Any]
K = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--only", nargs="*", default=None, help="rows whose name has one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=540, help="no row begins later (seconds)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.smoke:
        a.gpus, a.repeats = 2, 1
    elif torch.cuda.device_count() < a.gpus:
        raise SystemExit(f"{a.gpus} GPUs are needed, found {torch.cuda.device_count()}.")
    a.end = time.time() + a.limit
    if a.part == "attention" and "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run([*command, f"--nproc_per_node={a.gpus}", *sys.argv]).returncode
    return PARTS[a.part](a)


# --- results --------------------------------------------------------------------------------------


def keep(a: argparse.Namespace, row: Row, rows: list[Row], notes: Iterable[str] = ()) -> None:
    """Adds a row, prints it, and writes the table of the part anew. A row of the same name that was
    measured by an earlier command gives way.
    """
    import transformers

    print(json.dumps(row), flush=True)
    about = {
        "machine": f"{a.gpus} x {machine_name() if not a.smoke else 'CPU process'}",
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    rows[:] = [r for r in rows if r["row"] != row["row"]] + [{**row, "made": about}]
    if a.out is None:
        return
    path = stem(a)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"part": a.part, "rows": rows}, indent=1) + "\n"
    path.with_suffix(".json").write_text(text)
    made = dict.fromkeys(
        f"`{m['command']}` ({m['date']}, {m['machine']}, {m['versions']})"
        for m in (r["made"] for r in rows)
    )
    parts = [f"# {TITLES[a.part]}", table(rows), *notes, "\n".join(made)]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def stem(a: argparse.Namespace) -> Path:
    """Where a part's results go, without the suffix."""
    gpu = "CPU" if a.smoke else machine_name().split()[0]
    return Path(a.out) / f"many_gpus_{a.part}_{a.gpus}x{gpu}"


def earlier(a: argparse.Namespace) -> list[Row]:
    """Rows that earlier commands measured."""
    if a.out is None or not stem(a).with_suffix(".json").is_file():
        return []
    found: list[Row] = json.loads(stem(a).with_suffix(".json").read_text())["rows"]
    return found


def table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(k for r in rows for k in r if k not in ("made", "log")))
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


# --- attention ------------------------------------------------------------------------------------

SHAPES_OF_HEADS: dict[str, tuple[int, int, int, int]] = {
    "28/4 heads of 128": (28, 4, 128, 128),
    "32/8 heads of 128": (32, 8, 128, 128),
    "16/8 heads of 256": (16, 8, 256, 256),
    "16/16 heads of 192/128": (16, 16, 192, 128),
}
LENGTHS: tuple[tuple[int, str], ...] = (
    (64 * K, "28/4 heads of 128"),
    (128 * K, "28/4 heads of 128"),
    (64 * K, "32/8 heads of 128"),
    (128 * K, "32/8 heads of 128"),
    (128 * K, "16/8 heads of 256"),
    (128 * K, "16/16 heads of 192/128"),
    (256 * K, "28/4 heads of 128"),
    (512 * K, "28/4 heads of 128"),
    (1024 * K, "8/4 heads of 128"),
)
"""A million tokens have fewer heads: a pass of 28 takes 14 seconds on four GPUs."""
SHAPES_OF_HEADS["8/4 heads of 128"] = (8, 4, 128, 128)
ONE_GPU_AT = 128 * K
"""Longer documents are compared with the kernel's rate at this length: it grows no further."""


def attention(a: argparse.Namespace) -> int:
    """Runs in each process of a group."""
    setting = bench.start(a.smoke)
    rows = earlier(a) if setting.rank == 0 else []
    packed = [(mix, setting.packed_length) for mix in bench.MIXES]
    cases = [
        (f"one document of {length // K}k, {heads}", [length // 256 if a.smoke else length], heads)
        for length, heads in LENGTHS
    ] + [
        (
            f"{mix}, {length // K}k, 28/4 heads of 128",
            bench.mixed(setting, mix, length),
            "28/4 heads of 128",
        )
        for mix, length in packed
    ]
    for name, sizes, heads in cases:
        if not wanted(a, name):
            continue
        late = torch.tensor(int(time.time() > a.end))
        late = late.to(setting.device)
        dist.all_reduce(late)
        if int(late):
            row: Row = {"row": name, "error": "not started: the time of this command was up"}
        else:
            row = attempt(functools.partial(attention_row, setting, name, sizes, heads, a.repeats))
            row = {"row": name, **row}
        if setting.rank == 0:
            keep(a, row, rows, [ATTENTION_NOTE])
    dist.barrier()
    dist.destroy_process_group()
    return 0


ATTENTION_NOTE = (
    "TFLOP/s for each GPU, forward with backward, on the slowest rank, medians in turn. In brackets:"
    " over one GPU's kernel at the same work (documents above 128k: at 128k); milliseconds of NCCL's"
    " kernels (with waiting for other ranks), and of these what no other kernel hides. `auto` measures"
    " the schedules once and takes the fastest; its last column is its speed over the best one's."
)


def attempt(body: Callable[[], Row]) -> Row:
    """A row, or why there is none."""
    try:
        return body()
    except (RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def attention_row(
    setting: bench.Setting, name: str, sizes: list[int], heads_name: str, repeats: int
) -> Row:
    """One row of tokens under every schedule."""
    heads, kv_heads, dim, value_dim = SHAPES_OF_HEADS[heads_name]
    ctx = sp.SequenceParallel.create(setting.ranks, "auto", device_type=setting.device.type)
    ctx.set_heads(heads, kv_heads)
    unit = sp.alignment(ctx)
    sizes = [*sizes[:-1], sizes[-1] - sum(sizes) % unit]
    segments = bench.segments_of(sizes)
    length = segments[-1].stop
    slow = length >= 256 * K
    Measure(ctx, dim, value_dim, setting.dtype, setting.device)(length, segments)
    names = {c.name(setting.ranks): c for c in candidates(ctx, length)}
    plans = {
        schedule: RowPlan(
            length, tuple(segments), ctx, choice_of(c, setting.ranks, length, segments)
        )
        for schedule, c in names.items()
    }
    tensors = inputs(setting, length // setting.ranks, heads_name)
    steps = [functools.partial(forward_backward, plan, *tensors) for plan in plans.values()]
    times = dict(
        zip(plans, bench.timed_in_turn(setting, steps, 1 if slow else repeats), strict=True)
    )
    flop = 3.5 * 2.0 * attention_pairs(sizes) * heads * (dim + value_dim) / setting.ranks / 1e12
    base = one_gpu(setting, sizes, heads_name)
    row: Row = {}
    for (schedule, seconds), step in zip(times.items(), steps, strict=True):
        text = f"{flop / seconds:.0f} ({flop / seconds / base:.2f}"
        if setting.device.type == "cuda" and not slow:
            whole, bare = exchange_ms(step)
            text += f"; {whole:.1f} ms, exposed {bare:.1f}"
        row[schedule] = text + ")"
    choice = sp.plan(length, segments, ctx).choice
    taken = next(
        n for n, c in names.items() if (c.ulysses, c.exchange) == (choice.ulysses, choice.exchange)
    )
    return row | {
        "one GPU": base,
        "auto takes": taken,
        "auto over the best": min(times.values()) / times[taken],
    }


def inputs(setting: bench.Setting, rows: int, heads_name: str) -> list[torch.Tensor]:
    """q, k, v, dout of so many tokens, random."""
    heads, kv_heads, dim, value_dim = SHAPES_OF_HEADS[heads_name]
    generator = torch.Generator(setting.device).manual_seed(setting.rank)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
    return [
        torch.randn(rows, *shape, device=setting.device, dtype=setting.dtype, generator=generator)
        for shape in shapes
    ]


_BASES: dict[tuple[Any, ...], float] = {}


def one_gpu(setting: bench.Setting, sizes: list[int], heads_name: str) -> float:
    """TFLOP/s of one GPU alone on the same row; of a document of 128k in place of longer ones."""
    if len(sizes) == 1:
        sizes = [min(sizes[0], ONE_GPU_AT)]
    key = (tuple(sizes), heads_name)
    if key not in _BASES:
        heads, _, dim, value_dim = SHAPES_OF_HEADS[heads_name]
        ctx = setting.one
        plan = sp.plan(sum(sizes), bench.segments_of(sizes), ctx)
        step = functools.partial(forward_backward, plan, *inputs(setting, sum(sizes), heads_name))
        seconds = bench.timed(setting, step)
        _BASES[key] = (
            3.5 * 2.0 * attention_pairs(sizes) * heads * (dim + value_dim) / seconds / 1e12
        )
    return _BASES[key]


def exchange_ms(step: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds in which NCCL's kernels run in a step on this rank, and those of them in which
    no other kernel runs.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    messages, others = [], []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (messages if "nccl" in event.name.lower() else others).append(span)
    sent, busy = union(messages), union(others)
    hidden = sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        for a in sent
        for b in busy
        if a[0] < b[1] and b[0] < a[1]
    )
    whole = sum(stop - start for start, stop in sent)
    return whole / 1e3, (whole - hidden) / 1e3


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times as spans that do not overlap."""
    out: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


# --- runs of the command --------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def train(home: Path, name: str, devices: Sequence[int], keys: Row, limit: float) -> Row:
    """One run of `longfactory train` on some GPUs: losses, seconds of a step after the first,
    tokens of a step, peak.
    """
    out = home / f"out-{name}"
    keys = {
        "stage": "pt",
        "finetuning_type": "full",
        "dataset": "long",
        "packing": "false",
        "per_device_train_batch_size": 1,
        "learning_rate": "1e-5",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_final_model": "false",
        "overwrite_output_dir": "true",
        "disable_shuffling": "true",
        "include_num_input_tokens_seen": "true",
        "report_to": "none",
        "bf16": "true",
        "preprocessing_num_workers": 1,
        "nproc_per_node": len(devices),
        "output_dir": out,
        **keys,
    }
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    command += [f"{key}={value}" for key, value in keys.items()]
    env = {**os.environ, "RECORD_VRAM": "1", "LONGFACTORY_CACHE": str(home / "cache")}
    env |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
    begun = time.time()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=limit
        )
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        text, code = f"ended after {limit:.0f} s", -1
    row: Row = {"seconds in all": round(time.time() - begun)}
    log = out / "trainer_log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    steps = [x for x in lines if "loss" in x]
    if code:
        words = [line for line in text.splitlines() if line.strip()]
        row |= {"error": words[-1][:200] if words else "no output", "log": text[-3000:]}
    if len(steps) > 1:
        between = len(steps) - 1
        row["losses"] = [x["loss"] for x in steps]
        row["tokens"] = (steps[-1]["total_tokens"] - steps[0]["total_tokens"]) // between
        row["step s"] = (steps[-1]["elapsed_seconds"] - steps[0]["elapsed_seconds"]) / between
        row["peak GiB"] = steps[-1].get("vram_allocated")
    return row


def side_by_side(jobs: Sequence[Callable[[], Row]]) -> list[Row]:
    """Runs on GPUs of their own, at once."""
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def scaling(a: argparse.Namespace) -> int:
    """SP 1 and 2 run at once on GPUs of their own where there are enough; then 4, then 8."""
    shape, local, steps = ("tiny", 256, 3) if a.smoke else ("qwen2.5-7b", 32768, 4)
    sizes = [n for n in (1, 2, 4, 8) if n <= a.gpus]
    rows = earlier(a)
    rate: dict[int, float] = {}
    with workplace() as home:
        model = make_model(shape, home / "model")
        make_data(home / "data", steps, local * sizes[-1] * (3 if a.smoke else 4))

        def run(n: int, first: int) -> Row:
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": local * n,
                "sequence_parallel_size": n,
                "gradient_accumulation_steps": 1,
                "max_steps": steps,
                **({"sharding": "fsdp2"} if n > 1 and not a.smoke else {}),
                **({"bf16": "false"} if a.smoke else {}),
            }
            return train(
                home, f"sp{n}", range(first, first + n), keys, max(30.0, a.end - time.time())
            )

        pairs = [sizes[:2], *[[n] for n in sizes[2:]]]
        if a.gpus < 3:
            pairs = [[n] for n in sizes]
        found: dict[int, Row] = {}
        for group in pairs:
            jobs = [functools.partial(run, n, 2 if n == 2 and a.gpus > 3 else 0) for n in group]
            found |= dict(zip(group, side_by_side(jobs), strict=True))
        if not a.smoke:
            config = SHAPES[shape]
            rate = kernel_seconds(config, [local * n for n in sizes])
        for n in sizes:
            row = {"row": f"SP {n}, {local:,} local tokens", **found[n]}
            if "step s" in row:
                row["tokens/s a GPU"] = row["tokens"] / row["step s"] / n
            first = found[1]
            if rate and "step s" in first and "step s" in row:
                # seconds of a local token: t1 - a1 + a2, each GPU's share of the row's attention
                t1 = first["step s"] / first["tokens"]
                a1, a2 = rate[local] / local, rate[local * n] / (local * n)
                ideal = 1.0 / (t1 - a1 + a2)
                row |= {"ideal": ideal, "over the ideal": row["tokens/s a GPU"] / ideal}
            keep(a, row, rows, [SCALING_NOTE])
    return int(any("error" in r for r in found.values()))


SCALING_NOTE = (
    "Full parameters, memory: auto, rows of real text, seconds of the steps after the first. Ideal:"
    " 1 / (t1 - a1 + a2) tokens/s a GPU, t1 the seconds of a token at SP 1, a1 and a2 those of"
    " attention (all layers, forward and backward, one GPU's kernel, timed in the same run) at the"
    " local and at the whole length. Settings that `memory: auto` takes may differ between sizes."
)


def kernel_seconds(config: Row, lengths: Sequence[int]) -> dict[int, float]:
    """Seconds of attention's forward and backward, all layers, of one document of each length on
    one GPU; longer ones than 128k by the rate at 128k.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, layers = config["hidden_size"] // heads, config["num_hidden_layers"]
    one = sp.SequenceParallel(device_type="cuda")
    out: dict[int, float] = {}
    for length in lengths:
        measured = min(length, ONE_GPU_AT)
        q, k, v, dout = (
            torch.randn(measured, h, dim, device="cuda", dtype=torch.bfloat16)
            for h in (heads, kv_heads, kv_heads, heads)
        )
        plan = sp.plan(measured, None, one)
        found = []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            forward_backward(plan, q, k, v, dout)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        out[length] = layers * sorted(found)[2] * (length / measured) ** 2
    return out


def data_parallel(a: argparse.Namespace) -> int:
    """The same samples in every step, spread as DP x SP."""
    shape, length, steps = ("tiny", 256, 3) if a.smoke else ("qwen2.5-7b", 32768, 4)
    rows, failed = earlier(a), False
    base: list[float] | None = None
    with workplace() as home:
        model = make_model(shape, home / "model")
        make_data(home / "data", steps * a.gpus, length * (3 if a.smoke else 4))
        for n in [n for n in (1, 2, 4, 8) if n <= a.gpus]:
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": length,
                "sequence_parallel_size": n,
                "gradient_accumulation_steps": n,
                "max_steps": steps,
                **({} if a.smoke else {"sharding": "fsdp2"}),
                **({"bf16": "false"} if a.smoke else {}),
            }
            row = train(home, f"dp{n}", range(a.gpus), keys, max(30.0, a.end - time.time()))
            row = {"row": f"DP {a.gpus // n} x SP {n}, {a.gpus} x {length:,} tokens a step", **row}
            failed |= "error" in row
            if "losses" in row:
                base = base or row["losses"]
                row["tokens/s a GPU"] = row["tokens"] / row["step s"] / a.gpus
                row["largest relative difference of losses"] = max(
                    abs(x - y) / abs(y) for x, y in zip(row["losses"], base, strict=True)
                )
            keep(a, row, rows)
    return int(failed)


def parity(a: argparse.Namespace) -> int:
    """Losses of 20 steps, SP over all GPUs and one GPU in bf16, from those of one GPU in float32.

    Each seed gives another order of the data and other weights. One GPU's runs go side by side.
    """
    shape, length, steps, seeds = ("tiny", 128, 4, 1) if a.smoke else ("qwen2.5-0.5b", 8192, 20, 5)
    rows = earlier(a)
    found: dict[tuple[str, int], Row] = {}
    with workplace() as home:
        model = make_model(shape, home / "model")
        make_data(home / "data", steps, length * (3 if a.smoke else 4))

        def run(kind: str, seed: int, devices: Sequence[int]) -> Row:
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": length,
                "sequence_parallel_size": len(devices),
                "gradient_accumulation_steps": 1,
                "max_steps": steps,
                "learning_rate": "1e-4",
                "seed": seed,
                "disable_shuffling": "false",
                "bf16": str(kind != "float32").lower(),
                **({"sharding": "ddp"} if len(devices) > 1 else {}),
            }
            name = f"{kind}-{len(devices)}-{seed}"
            return train(home, name, devices, keys, max(30.0, a.end - time.time()))

        alone = [(kind, seed) for seed in range(seeds) for kind in ("float32", "one GPU")]
        for start in range(0, len(alone), a.gpus):
            group = alone[start : start + a.gpus]
            jobs = [functools.partial(run, *each, [i]) for i, each in enumerate(group)]
            found |= dict(zip(group, side_by_side(jobs), strict=True))
        for seed in range(seeds):
            found["all", seed] = run("all", seed, range(a.gpus))
            ends = [found[kind, seed] for kind in ("float32", "one GPU", "all")]
            bad = [r["error"] for r in ends if "error" in r]
            row: Row = {"row": f"seed {seed}, {steps} steps of {length:,} tokens"}
            if bad:
                row["error"] = bad[0]
            else:
                exact, one, every = (r["losses"] for r in ends)
                near, far = rms(one, exact), rms(every, exact)
                row |= {
                    "one GPU from float32 (RMS)": near,
                    f"SP {a.gpus} from float32 (RMS)": far,
                    "ratio": far / near if near else float("inf"),
                    "last loss": exact[-1],
                }
            keep(a, row, rows)
    ratios = sorted(r["ratio"] for r in rows if "ratio" in r)
    if ratios:
        middle = ratios[len(ratios) // 2]
        keep(a, {"row": "median", "ratio": middle}, rows)
    return int(not ratios)


def rms(found: Sequence[float], exact: Sequence[float]) -> float:
    """Root mean square of the differences of two curves."""
    squares = [(x - y) ** 2 for x, y in zip(found, exact, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attention": attention,
    "scaling": scaling,
    "data": data_parallel,
    "parity": parity,
}
TITLES = {
    "attention": "Attention over the GPUs of one machine",
    "scaling": "Sequence parallelism: tokens a second of a GPU as a row is spread wider",
    "data": "The same samples a step, as data parallel x sequence parallel",
    "parity": "bf16 with sequence parallelism, as far from float32 as one GPU?",
}


if __name__ == "__main__":
    raise SystemExit(main())
