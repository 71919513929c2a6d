"""Sequence parallelism over the GPUs of one machine: attention, scaling, length, peers, parity.

    python benchmarks/many_gpus.py --gpus 4 --part attention --out benchmarks/results
    python benchmarks/many_gpus.py --gpus 4 --part length --only "7B, 1,048,576" --out benchmarks/results
    python benchmarks/many_gpus.py --gpus 4 --check             # every part at once, small, a minute
    python benchmarks/many_gpus.py --smoke --part attention     # two CPU processes, tiny shapes

Each part is one command of less than 10 minutes, bounded by `--limit`, and writes
many_gpus_PART_NxGPU.json and .md into `--out`; with it, rows that were measured before stay unless
they are measured again.

attention  every schedule, and `auto`, on documents of 64k to 1M tokens and on packed rows, head
           dims 128, 256 and 192/128; TFLOP/s a GPU, over one GPU's kernel at the same work, and the
           exchange: NCCL's kernels (with waiting for other ranks) and what of them no other kernel
           hides
scaling    14 of the 28 layers of Qwen2.5-7B's shape (so that one GPU holds the optimizer, too) through
           `longfactory train`, all parameters, 32,768 local tokens, SP 1, 2, 4, ...; tokens/s a GPU
           over the attention-corrected ideal 1 / (t1 - a1 + a2): t1 the time of a token at SP 1, a1
           and a2 attention's at the local and at the whole length, by the kernel's rates of the same
           run
data       DP x SP through the command at the same samples a step: tokens/s and losses
length     one step of the longest rows through the command; each with a time limit of its own
peers      DeepSpeed ALST beside LongFactory (`_peers.py`), and where a step's time goes on the device
parity     20 steps of a 0.5B shape in bf16: SP's distance from the float32 curve beside one GPU's.
           Nothing is timed: all runs share the GPUs
resume     a run over all GPUs whose process of one rank is killed, resumed over half of them
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import attention as bench  # noqa: E402
import published  # noqa: E402
from _device_time import divided  # noqa: E402
from _table import (  # noqa: E402
    MARK,
    Clock,
    GiB,
    command_line,
    end_marked,
    job,
    log_file,
    machine_name,
    run_row,
)
from longfactory import sp  # noqa: E402
from longfactory.sp.measure import (  # noqa: E402
    MOST_PASSES,
    PASSES,
    Measure,
    forward_backward,
    repeated,
)
from longfactory.sp.plan import RowPlan  # noqa: E402
from longfactory.sp.schedules.choose import candidates, choice_of  # noqa: E402
from make_model import SHAPES, make_model  # noqa: E402
from per_document_zigzag import attention_pairs  # noqa: E402
from plan_accuracy import (  # noqa: E402
    DPO,
    FULL,
    FURTHER,
    LORA,
    SFT,
    TOO_LONG,
    ended_in_time,
)
from sp_training import make_data  # noqa: E402

Row = dict[str, Any]
K = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--check", action="store_true", help="every part at once, small")
    parser.add_argument("--small", action="store_true", help="small shapes, on GPUs")
    parser.add_argument("--only", nargs="*", default=None, help="rows whose name has one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=540, help="no row begins later (seconds)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.check == (a.part is not None):
        parser.error("either --part or --check is needed")
    if a.smoke:
        a.gpus = 2
    if a.smoke or a.small:
        a.repeats, a.small = 1, True
    if not a.smoke and torch.cuda.device_count() < a.gpus:
        raise SystemExit(f"{a.gpus} GPUs are needed, found {torch.cuda.device_count()}.")
    a.end = time.time() + a.limit
    if a.check:
        return check(a)
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


HIDDEN = ("made", "losses", "schedule")
"""Of a row, what its table does not show."""


def table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(k for r in rows for k in r if k not in HIDDEN))
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
    (32 * K, "28/4 heads of 128"),
    (32 * K, "32/8 heads of 128"),
    (64 * K, "28/4 heads of 128"),
    (64 * K, "32/8 heads of 128"),
    (128 * K, "28/4 heads of 128"),
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
    smaller = 256 if a.smoke else 16 if a.small else 1
    if a.small and not a.smoke:
        setting = dataclasses.replace(setting, packed_length=setting.packed_length // 4)
    documents = [
        (f"one document of {length // K}k, {heads}", [length // smaller], heads)
        for length, heads in LENGTHS
    ]
    mixes = [
        (
            f"{mix}, {length // K}k, 28/4 heads of 128",
            bench.mixed(setting, mix, length),
            "28/4 heads of 128",
        )
        for mix, length in packed
    ]
    cases = [*documents[:6], *mixes, *documents[6:]]
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
    " the schedules once and takes the fastest, the rule computes; beside both, their schedule's speed"
    " over the best one's. Published implementations run on FlashAttention 2."
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
    if slow:
        repeats = min(repeats, 3 if length == 256 * K else 1)
    began = time.perf_counter()
    Measure(ctx, dim, value_dim, setting.dtype, setting.device)(length, segments)
    measured_for = time.perf_counter() - began
    names = {c.name(setting.ranks): c for c in candidates(ctx, length)}
    plans = {
        schedule: RowPlan(
            length, tuple(segments), ctx, choice_of(c, setting.ranks, length, segments)
        )
        for schedule, c in names.items()
    }
    tensors = inputs(setting, length // setting.ranks, heads_name)
    steps = [functools.partial(forward_backward, plan, *tensors) for plan in plans.values()]
    flop = 3.5 * 2.0 * attention_pairs(sizes) * heads * (dim + value_dim) / setting.ranks / 1e12
    times = dict(zip(plans, in_turn(setting, steps, repeats, flop), strict=True))
    base = one_gpu(setting, sizes, heads_name)
    row: Row = {}
    parts: dict[str, dict[str, float]] = {}
    for (schedule, seconds), step in zip(times.items(), steps, strict=True):
        text = f"{flop / seconds:.0f} ({flop / seconds / base:.2f}"
        if setting.device.type == "cuda" and not slow:
            parts[schedule] = divided(step)
            message, exposed = (parts[schedule][k] for k in ("messages", "exposed"))
            text += f"; {message:.1f} ms, exposed {exposed:.1f}"
        row[schedule] = text + ")"
    choice = sp.plan(length, segments, ctx).choice
    taken = next(
        n for n, c in names.items() if (c.ulysses, c.exchange) == (choice.ulysses, choice.exchange)
    )
    by_rule = sp.SequenceParallel.create(setting.ranks, "auto", device_type=setting.device.type)
    by_rule.set_heads(heads, kv_heads)
    ruled = sp.plan(length, segments, by_rule).choice
    by_the_rule = next(
        n for n, c in names.items() if (c.ulysses, c.exchange) == (ruled.ulysses, ruled.exchange)
    )
    best = min(times.values())
    if taken in parts:
        row["auto's ms"] = ", ".join(f"{k} {v:.1f}" for k, v in parts[taken].items())
        row["ms"] = 1e3 * times[taken]
        row["one GPU's ms / n"] = 1e3 * flop / base
    row |= {
        "one GPU": base,
        "auto takes": taken,
        "auto over the best": best / times[taken],
        "measured in s": measured_for,
        "the rule takes": by_the_rule,
        "the rule over the best": best / times[by_the_rule],
    }
    if dim == value_dim == 128 and not slow:
        for peer in bench.peers(setting, sizes):
            row[peer.name] = beside(setting, peer, (heads, kv_heads, dim), flop, best)
    return row


def beside(
    setting: bench.Setting, peer: bench.Peer, shape: tuple[int, int, int], flop: float, best: float
) -> str:
    """TFLOP/s of a published implementation on the same documents, and the speed of the best
    schedule over it.
    """
    if published.version(peer.package) is None:
        return "not installed"
    theirs = bench.theirs(setting)
    tensors = bench.inputs(len(peer.rows), *shape, theirs, seed=setting.rank)
    attention = peer.make()
    step = functools.partial(bench.forward_backward, attention, *tensors)
    (seconds,) = in_turn(theirs, [step], min(2, setting.repeats), flop)
    return f"{flop / seconds:.0f} (ours {seconds / best:.2f}x)"


def in_turn(
    setting: bench.Setting, steps: Sequence[Callable[[], object]], repeats: int, flop: float
) -> list[float]:
    """Seconds of each step. Short ones are timed some at a time, as layers follow each other.

    Args:
        flop: of a step on a GPU, in units of 10^12.
    """
    passes = max(1, min(MOST_PASSES, int(PASSES / (flop / 400)))) if not setting.smoke else 2
    many = [functools.partial(repeated, step, passes) for step in steps]
    return [seconds / passes for seconds in bench.timed_in_turn(setting, many, repeats)]


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
        flop = 3.5 * 2.0 * attention_pairs(sizes) * heads * (dim + value_dim) / 1e12
        (seconds,) = in_turn(setting, [step], setting.repeats, flop)
        _BASES[key] = flop / seconds
    return _BASES[key]


# --- runs of the command --------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


PLAIN: Row = {
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
}


def train(home: Path, name: str, devices: Sequence[int], keys: Row, limit: float) -> Row:
    """One run of `longfactory train` on some GPUs: losses, seconds of a step after the first,
    tokens of a step, peak.
    """
    out = home / f"out-{name}"
    keys = {**PLAIN, "nproc_per_node": len(devices), "output_dir": out, **keys}
    begun = time.time()
    code, text = ended_in_time(words_of("train", keys), environment(home, devices), limit)
    row: Row = {"seconds in all": round(time.time() - begun), **planned(text)}
    steps = logged(out)
    if code:
        row |= failure(code, text, limit)
    if steps:
        row["losses"] = [x["loss"] for x in steps]
        row["first step s"] = steps[0]["elapsed_seconds"]
        row["peak GiB"] = steps[-1].get("vram_allocated")
        row["tokens"] = steps[0].get("total_tokens")
    if len(steps) > 1:
        between = len(steps) - 1
        row["tokens"] = (steps[-1]["total_tokens"] - steps[0]["total_tokens"]) // between
        row["step s"] = (steps[-1]["elapsed_seconds"] - steps[0]["elapsed_seconds"]) / between
    return row


def words_of(command: str, keys: Row) -> list[str]:
    """One of LongFactory's commands, as a process is started."""
    words = [sys.executable, "-m", "longfactory.cli", command]
    return words + [f"{key}={value}" for key, value in keys.items()]


def environment(home: Path, devices: Sequence[int]) -> dict[str, str]:
    """Of a run on some GPUs: no network, a cache of its own."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    own = {
        "RECORD_VRAM": "1",
        "LONGFACTORY_CACHE": str(home / "cache"),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **own}


def planned(text: str) -> Row:
    """What a run's log says of its memory plan."""
    row: Row = {}
    if (settings := re.search(r"Memory plan.*\n +(.*)", text)) is not None:
        row["settings"] = settings[1]
    if (seconds := re.search(r"predicted: ([0-9.,]+) s a row", text)) is not None:
        row["predicted s"] = float(seconds[1].replace(",", ""))
    if (schedule := re.findall(r"sequence parallelism, rows like .*", text)) != []:
        row["schedule"] = schedule[-1][-120:]
    return row


def logged(out: Path) -> list[Row]:
    """The steps in a run's log."""
    log = out / "trainer_log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    return [x for x in lines if "loss" in x]


def failure(code: int, text: str, limit: float) -> Row:
    """Of a run that ended with an error: its last line, and the end of its log."""
    print(text[-3000:], file=sys.stderr, flush=True)
    words = [line for line in text.splitlines() if line.strip()]
    why = words[-1][:200] if words else "no output"
    return {"error": f"ended after {limit:.0f} s: {why}" if code == TOO_LONG else why}


def side_by_side(jobs: Sequence[Callable[[], Row]], most: int = 8) -> list[Row]:
    """Runs at once, at most so many."""
    with concurrent.futures.ThreadPoolExecutor(min(most, len(jobs))) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def model_folder(a: argparse.Namespace, folder: Path, shape: str, layers: int | None) -> Path:
    """A model folder without weights; with --smoke a tiny one. Its tokenizer makes a token of each
    byte, which takes no time.
    """
    name = "tiny" if a.smoke else shape
    make_model(name if name in SHAPES else "qwen2.5-7b", folder, vocabulary=BYTES)
    config = dict(SHAPES.get(name) or FURTHER[name])
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


BYTES = 259
"""Entries of a tokenizer of bytes: theirs and three marks."""


def on_gpus(a: argparse.Namespace, n: int) -> Row:
    """Keys of a run over `n` GPUs; on CPUs other ones."""
    if a.smoke:
        return {"bf16": "false"}
    return {"sharding": "fsdp2"} if n > 1 else {}


def scaling(a: argparse.Namespace) -> int:
    """SP 1 and 2 run at once on GPUs of their own where there are enough; then 4, then 8."""
    layers, local, steps = 14, 32768, 4
    if a.small:
        layers, local, steps = 2, 256 if a.smoke else 2048, 3
    sizes = [n for n in (1, 2, 4, 8) if n <= a.gpus]
    rows = earlier(a)
    rate: dict[int, float] = {}
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-7b", layers)
        make_data(home / "data", steps, local * sizes[-1] * (3 if a.smoke else 4))

        def run(n: int, first: int) -> Row:
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": local * n,
                "sequence_parallel_size": n,
                "sequence_parallel_mode": "auto",
                "gradient_accumulation_steps": 1,
                "max_steps": steps,
                **on_gpus(a, n),
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
            config = {**SHAPES["qwen2.5-7b"], "num_hidden_layers": layers}
            rate = kernel_seconds(config, [local * n for n in sizes])
        for n in sizes:
            row = {"row": f"SP {n}, {local:,} local tokens, {layers} layers", **found[n]}
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
    "Full parameters, memory: auto, mode auto, rows of real text, seconds of the steps after the first. Ideal:"
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
    layers, length, steps = 14, 32768, 4
    if a.small:
        layers, length, steps = 2, 256 if a.smoke else 2048, 3
    rows, failed = earlier(a), False
    base: list[float] | None = None
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-7b", layers)
        make_data(home / "data", steps * a.gpus, length * (3 if a.smoke else 4))
        for n in [2] if a.small else [n for n in (1, 2, 4, 8) if n <= a.gpus]:
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": length,
                "sequence_parallel_size": n,
                "sequence_parallel_mode": "auto",
                "gradient_accumulation_steps": n,
                "max_steps": steps,
                **on_gpus(a, a.gpus),
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
    """Losses of 20 steps, SP over all GPUs and one GPU in bf16, from those of one GPU in float32;
    and the gradients of a tiny model in float32 under every mode, by `longfactory verify`.

    Each seed gives another order of the data and other weights. All runs go at once.
    """
    length, steps, seeds, layers = 8192, 20, 5, None
    if a.small:
        length, steps, seeds, layers = 128 if a.smoke else 1024, 4, 1, 2
    rows = earlier(a)
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-0.5b", layers)
        make_data(home / "data", steps, 2 * length)

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
                "bf16": str(kind != "float32" and not a.smoke).lower(),
                **({"sharding": "ddp"} if len(devices) > 1 else {}),
            }
            name = f"{kind}-{len(devices)}-{seed}"
            return train(home, name, devices, keys, max(30.0, a.end - time.time()))

        jobs: dict[tuple[str, int | str], Callable[[], Row]] = {}
        for seed in range(seeds):
            for kind in ("float32", "one GPU"):
                device = len(jobs) % a.gpus
                jobs[kind, seed] = functools.partial(run, kind, seed, [device])
            jobs["all", seed] = functools.partial(run, "all", seed, range(a.gpus))
        for mode in ("zigzag-ring", "ulysses", "llama3", "usp"):
            jobs["gradients", mode] = functools.partial(gradients, a, home, mode)
        found = dict(
            zip(jobs, side_by_side(list(jobs.values()), most=3 if a.smoke else 32), strict=True)
        )
    for seed in range(seeds):
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
    ratios = sorted(r["ratio"] for r in rows if "ratio" in r and r["row"] != "median")
    if ratios:
        keep(a, {"row": "median", "ratio": ratios[len(ratios) // 2]}, rows)
    for (kind, mode), row in found.items():
        if kind == "gradients":
            keep(a, {"row": f"float32, {mode}: gradients", **row}, rows)
    return int(not ratios or any("error" in r for r in found.values()))


def gradients(a: argparse.Namespace, home: Path, mode: str) -> Row:
    """The worst gradient of a tiny model in float32 under a mode, from one process in float64."""
    model = make_model("tiny", home / f"tiny-{mode}", vocabulary=BYTES)
    report = home / f"verify-{mode}.json"
    keys = {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "dataset_dir": home / "data",
        "stage": "pt",
        "dataset": "long",
        "finetuning_type": "full",
        "packing": "false",
        "cutoff_len": 2048 if not a.smoke else 256,
        "sequence_parallel_size": a.gpus,
        "sequence_parallel_mode": mode,
        "nproc_per_node": a.gpus,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "bf16": "false",
        "preprocessing_num_workers": 1,
        "report_to": "none",
        "output_dir": home / f"out-{mode}",
    }
    limit = max(30.0, a.end - time.time())
    command = [*words_of("verify", keys), "--json", str(report)]
    code, text = ended_in_time(command, environment(home, range(a.gpus)), limit)
    if not report.exists():
        return failure(code or 1, text, limit)
    return verified(json.loads(report.read_text()))


def rms(found: Sequence[float], exact: Sequence[float]) -> float:
    """Root mean square of the differences of two curves."""
    squares = [(x - y) ** 2 for x, y in zip(found, exact, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


def verified(report: Row) -> Row:
    """What `longfactory verify` found."""
    worst = max(p["difference"] for p in report["parameters"].values())
    row: Row = {"worst gradient": worst, "loss off": report["loss"]["difference"]}
    row["grad_norm off"] = report["grad_norm"]["difference"]
    return row if report["exact"] else {**row, "error": "verify found a difference"}


# --- the longest rows -----------------------------------------------------------------------------


class Long(NamedTuple):
    """One row of the part `length`. `layers`: of the shape's, None for all. A row of one step is
    timed with what its first step builds and pins; with two steps the second counts.
    """

    shape: str
    layers: int | None
    tokens: int
    keys: Row
    steps: int
    limit: float


LONG: dict[str, Long] = {
    "7B, 1,048,576 tokens, full SFT": Long("qwen2.5-7b", None, 1 << 20, SFT | FULL, 1, 575),
    "Qwen3-30B-A3B, 131,072 tokens, full SFT": Long(
        "qwen3-30b-a3b", None, 131072, SFT | FULL, 2, 180
    ),
    "14B, 6 of 48 layers, 524,288 tokens, full SFT": Long(
        "qwen2.5-14b", 6, 1 << 19, SFT | FULL, 2, 150
    ),
    "7B, 4 of 28 layers, 786,432 tokens, full DPO pair": Long(
        "qwen2.5-7b", 4, 786432, DPO | FULL, 2, 200
    ),
    "Qwen3-30B-A3B, 8 of 48 layers, 524,288 tokens, LoRA SFT": Long(
        "qwen3-30b-a3b", 8, 1 << 19, SFT | LORA, 2, 150
    ),
    "7B, 14 of 28 layers, 1,048,576 tokens, full SFT": Long(
        "qwen2.5-7b", 14, 1 << 20, SFT | FULL, 1, 330
    ),
    "14B, 524,288 tokens, full SFT": Long("qwen2.5-14b", None, 1 << 19, SFT | FULL, 1, 420),
    "7B, 786,432 tokens, full DPO pair": Long("qwen2.5-7b", None, 786432, DPO | FULL, 1, 480),
    "Qwen3-30B-A3B, 524,288 tokens, LoRA SFT": Long(
        "qwen3-30b-a3b", None, 1 << 19, SFT | LORA, 1, 420
    ),
}


def length(a: argparse.Namespace) -> int:
    """One row after another; a row whose limit is more than what is left gets what is left."""
    if a.small:
        return short_rows(a)
    rows, failed = earlier(a), False
    for name, at in LONG.items():
        if not wanted(a, name):
            continue
        left = a.end - time.time()
        if left < 30:
            keep(a, {"row": name, "error": "not started: the time of this command was up"}, rows)
            failed = True
            continue
        with workplace() as home:
            row = long_row(a, home, at, min(at.limit, left))
        failed |= "error" in row
        keep(a, {"row": name, **row}, rows, [LENGTH_NOTE])
    return int(failed)


def short_rows(a: argparse.Namespace) -> int:
    """Every kind of row at once, a layer of it and few tokens."""
    kinds = {f"{at.shape} {at.keys}": (name, at) for name, at in LONG.items()}

    def one(name: str, at: Long) -> Row:
        at = at._replace(layers=1, tokens=at.tokens // (1024 if a.smoke else 128), steps=2)
        with workplace() as home:
            return {"row": name, **long_row(a, home, at, a.end - time.time())}

    jobs = [functools.partial(one, *kind) for kind in kinds.values() if wanted(a, kind[0])]
    rows: list[Row] = []
    for row in side_by_side(jobs, most=1 if a.smoke else 8):
        keep(a, row, rows, [LENGTH_NOTE])
    return int(any("error" in row for row in rows))


LENGTH_NOTE = (
    "Through `longfactory train`, random weights, nothing saved, FSDP2, bf16 with fp32 master"
    " weights, memory: auto. Where a row has one step, its seconds are those of the first, with"
    " everything that it builds and pins. A pair of DPO: 95 % of its tokens are the prompt that both"
    " answers share; the reference's log-probabilities are computed before the steps."
)


def long_row(a: argparse.Namespace, home: Path, at: Long, limit: float) -> Row:
    """Writes model and data, and trains."""
    model = model_folder(a, home / "model", at.shape, at.layers)
    stage = at.keys["stage"]
    make_long(home / "data", at.tokens, at.steps, pairs=stage == "dpo")
    keys = {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "dataset_dir": home / "data",
        "cutoff_len": at.tokens,
        "sequence_parallel_size": a.gpus,
        "sequence_parallel_mode": "auto",
        "gradient_accumulation_steps": 1,
        "max_steps": at.steps,
        **on_gpus(a, a.gpus),
        **at.keys,
    }
    if stage == "dpo":
        keys |= {"precompute_ref_log_probs": "true"}
    row = train(home, "long", range(a.gpus), keys, limit)
    if "first step s" in row:
        seconds = row.get("step s", row["first step s"])
        row["tokens/s a GPU"] = (row["tokens"] or at.tokens) / seconds / a.gpus
    return row


def make_long(folder: Path, tokens: int, rows: int, pairs: bool) -> None:
    """Samples that a tokenizer of bytes makes `tokens` tokens of, nearly: one answer, or a pair of
    short answers to a long prompt.
    """
    import pydoc_data.topics

    text = "\n\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    text *= tokens // len(text) + 1
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, str]] = []
    for i in range(rows):
        if pairs:
            answer = tokens // 40
            prompt = text[: tokens - 2 * answer - 64]
            samples.append(
                {
                    "instruction": f"{i} {prompt}",
                    "chosen": text[:answer],
                    "rejected": text[answer : 2 * answer],
                }
            )
        else:
            samples.append({"instruction": f"Part {i}.", "output": text[:tokens]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info: Row = {"answers": {"file_name": "samples.jsonl"}}
    info["pairs"] = {"file_name": "samples.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))


# --- beside other systems -------------------------------------------------------------------------


def peers(a: argparse.Namespace) -> int:
    """LongFactory and DeepSpeed's ALST on the same kernel, each in processes of its own."""
    cases: list[tuple[str, int, int | None]] = [
        ("7B", 128 * K, None),
        ("7B, 4 of 28 layers", 512 * K, 4),
    ]
    if a.small:
        cases = [("7B, 2 layers", 512 if a.smoke else 8192, None if a.smoke else 2)]
    rows, failed = earlier(a), False
    clock, log = Clock(a.end - time.time()), log_file("many-gpus-peers")
    for what, tokens, layers in cases:
        ours: Row | None = None
        for name, system in (("ours", "LongFactory"), ("alst", "DeepSpeed ALST")):
            label = f"{system}, {what}, {tokens:,} tokens"
            if not wanted(a, label):
                continue
            keys: Row = {"layers": layers, "steps": 1, "warm": tokens < 256 * K, "profile": True}
            keys |= {"shape": "tiny", "kernel": "cpu"} if a.smoke else {"shape": "7b"}
            if name == "ours":
                keys["mode"] = "auto"
            (fact,) = run_row(job(name, [tokens], **keys), a.gpus, clock, log)[:1]
            row: Row = {"row": label}
            if "seconds" in fact:
                row |= {
                    "step s": fact["seconds"],
                    "tokens/s a GPU": tokens / a.gpus / fact["seconds"],
                    "peak GiB": fact["peak"] / GiB,
                    "kernels": ", ".join(fact.get("kernels", [])),
                }
                if ours is not None and "step s" in ours:
                    row["LongFactory is"] = f"{fact['seconds'] / ours['step s']:.2f}x"
                row |= {f"{k} ms": v for k, v in fact.get("device_ms", {}).items()}
            else:
                row["error"] = fact.get("error", "no result")
                print(log.read_text()[-3000:], file=sys.stderr, flush=True)
                failed = True
            ours = row if name == "ours" else ours
            keep(a, row, rows, [PEERS_NOTE])
    return int(failed)


PEERS_NOTE = (
    "Complete training steps (`_peers.py`): full parameters, AdamW with exact fp32 weights and states"
    " sharded over the GPUs, random tokens. Milliseconds are of one further step on the first rank,"
    " under the profiler: sums of kernels by kind, messages (with waiting for other ranks), of these"
    " what no other kernel hides, and the time in which nothing runs."
)


# --- killed and resumed ---------------------------------------------------------------------------


def resume(a: argparse.Namespace) -> int:
    """A run over all GPUs, its last process killed after a checkpoint, resumed over half of them;
    losses beside those of a run that nothing ended.
    """
    steps, saved = 8, 2
    local = 256 if a.smoke else 1024
    half = max(1, a.gpus // 2)
    rows = earlier(a)
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-0.5b", 2)
        make_data(home / "data", steps, 2 * local * a.gpus)

        def keys(n: int, **more: Any) -> Row:
            return {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": home / "data",
                "cutoff_len": local * a.gpus,
                "sequence_parallel_size": n,
                "sequence_parallel_mode": "zigzag-ring",
                "gradient_accumulation_steps": 1,
                "max_steps": steps,
                "save_strategy": "steps",
                "save_steps": saved,
                "overwrite_output_dir": "false",
                **on_gpus(a, n),
                **more,
            }

        limit = max(30.0, a.end - time.time())
        whole = functools.partial(
            train, home, "whole", range(a.gpus), keys(a.gpus, save_strategy="no"), limit
        )
        broken = functools.partial(killed, home, range(a.gpus), keys(a.gpus), saved + 1, limit)
        straight, ended = side_by_side([whole, broken])
        row: Row = {"row": f"killed at SP {a.gpus}, resumed at SP {half}"} | ended
        if "error" not in row:
            again = train(home, "killed", range(half), keys(half), limit)
            row |= {k: v for k, v in again.items() if k in ("error", "seconds in all")}
            after = {x["current_steps"]: x["loss"] for x in logged(home / "out-killed")}
            expected = straight.get("losses", [])
            if len(expected) == len(after) == steps:
                row["largest relative difference of losses"] = max(
                    abs(after[i + 1] - loss) / abs(loss) for i, loss in enumerate(expected)
                )
            else:
                row.setdefault("error", f"steps: {sorted(after)}; without a stop {len(expected)}")
        keep(a, row, rows)
    return int("error" in row)


def killed(home: Path, devices: Sequence[int], keys: Row, step: int, limit: float) -> Row:
    """A run whose process of the last rank is sent SIGKILL when `step` steps are done."""
    out = home / "out-killed"
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    words = words_of("train", {**PLAIN, "nproc_per_node": len(devices), "output_dir": out, **keys})
    begun = time.time()
    with open(home / "killed.txt", "w") as text:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=text,
            stderr=subprocess.STDOUT,
            env={**environment(home, devices), MARK: mark},
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.time() - begun < limit:
                if len(logged(out)) >= step and (victim := rank_of(mark, len(devices) - 1)):
                    os.kill(victim, signal.SIGKILL)
                    process.wait(limit)
                    break
                time.sleep(0.05)
        finally:
            end_marked(mark, process.pid)
    done = [x["current_steps"] for x in logged(out)]
    said = (home / "killed.txt").read_text()
    if process.returncode in (0, None):
        return {"error": f"the run ended with {process.returncode} before a process was killed"}
    print(said[-1500:], file=sys.stderr, flush=True)
    return {"killed after steps": max(done, default=0), "exit status": process.returncode}


def rank_of(mark: str, rank: int) -> int | None:
    """The process of a run that has this rank."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                if f"{MARK}={mark}".encode() in words and f"RANK={rank}".encode() in words:
                    return int(entry.name)
    return None


# --- every part at once ---------------------------------------------------------------------------


def check(a: argparse.Namespace) -> int:
    """Starts each part with small shapes in processes of their own; prints how each ended."""
    begun = time.time()

    def one(part: str) -> tuple[str, int, str]:
        command = [sys.executable, __file__, "--part", part, "--gpus", str(a.gpus)]
        command += ["--smoke" if a.smoke else "--small", "--limit", str(a.end - time.time() - 5)]
        code, text = ended_in_time(command, dict(os.environ), max(10.0, a.end - time.time()))
        return part, code, text

    parts = [part for part in PARTS if wanted(a, part)]
    failed = False
    with concurrent.futures.ThreadPoolExecutor(1 if a.smoke else len(parts)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, p) for p in parts]):
            part, code, text = done.result()
            bad = code != 0 or '"error"' in text
            failed |= bad
            print(f"--- {part}: exit status {code}, {time.time() - begun:.0f} s", flush=True)
            print(text[-6000:] if bad else text[-1500:], flush=True)
    return int(failed)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attention": attention,
    "scaling": scaling,
    "data": data_parallel,
    "length": length,
    "peers": peers,
    "parity": parity,
    "resume": resume,
}


TITLES = {
    "attention": "Attention over the GPUs of one machine",
    "scaling": "Sequence parallelism: tokens a second of a GPU as a row is spread wider",
    "data": "The same samples a step, as data parallel x sequence parallel",
    "length": "The longest rows",
    "peers": "Beside DeepSpeed ALST",
    "resume": "Resumed over half of the GPUs",
    "parity": "bf16 with sequence parallelism, as far from float32 as one GPU?",
}


if __name__ == "__main__":
    raise SystemExit(main())
