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
packed     packed rows taken apart: small tiles, imbalance, launches, exchange; any number of ranks,
           timed share by share on what GPUs there are
scaling    Qwen2.5-7B's shape, all parameters, 32,768 local tokens, SP 1, 2, 4, ... with DP for the rest;
           tokens/s a GPU over the attention-corrected ideal; and DP x SP at the same samples a step:
           tokens/s and losses
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
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _many_attention import ATTENTION_NOTE, ONE_GPU_AT, attention  # noqa: E402
from _many_commands import (  # noqa: E402
    PLAIN,
    Job,
    environment,
    in_one_group,
    logged,
    side_by_side,
    train,
    words_of,
    workplace,
)
from _many_packed import PACKED_NOTE, packed  # noqa: E402
from _many_table import K, Row, earlier, from_log, keep, wanted  # noqa: E402
from _table import MARK, Clock, GiB, end_marked, job, log_file, run_row  # noqa: E402
from longfactory import sp  # noqa: E402
from longfactory.sp.measure import forward_backward  # noqa: E402
from make_model import SHAPES, make_model  # noqa: E402
from plan_accuracy import DPO, FULL, FURTHER, LORA, SFT, ended_in_time  # noqa: E402
from sp_training import make_data  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--check", action="store_true", help="every part at once, small")
    parser.add_argument("--small", action="store_true", help="small shapes, on GPUs")
    parser.add_argument("--only", nargs="*", default=None, help="rows whose name has one of these")
    parser.add_argument("--repeats", type=int, help="default 5: of what is timed; seeds of parity")
    parser.add_argument("--layers", type=int, default=28, help="of the part scaling")
    parser.add_argument("--limit", type=float, default=540, help="no row begins later (seconds)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--after",
        type=Path,
        help="runs in a group begin, all imported, when there is such a file",
    )
    parser.add_argument("--log", type=Path, help="what this command printed, to write tables of")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.check == (a.part is not None):
        parser.error("either --part or --check is needed")
    a.title, a.notes = TITLES.get(a.part), NOTES.get(a.part, [])
    if a.log is not None:
        return from_log(a)
    if a.smoke:
        a.gpus = 2
    if a.smoke or a.small:
        a.repeats, a.small = a.repeats or 1, True
    a.repeats = a.repeats or 5
    if not a.smoke and torch.cuda.device_count() < a.gpus:
        raise SystemExit(f"{a.gpus} GPUs are needed, found {torch.cuda.device_count()}.")
    a.end = time.time() + a.limit
    if a.check:
        return check(a)
    if a.part in ("attention", "packed") and "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run([*command, f"--nproc_per_node={a.gpus}", *sys.argv]).returncode
    return PARTS[a.part](a)


# --- results --------------------------------------------------------------------------------------


# --- runs of the command --------------------------------------------------------------------------


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
    """Runs over all GPUs: SP 1, 2, 4, ... at the same local tokens, and the same
    samples a step as DP x SP.
    """
    layers, local, steps = a.layers, 32768, 3
    if a.small:
        layers, local, steps = 2, 256 if a.smoke else 2048, 3
    sizes = [n for n in (1, 2, 4, 8) if n <= a.gpus]
    rows, found = earlier(a), {}
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-7b", layers)

        def job(n: int, length: int, accumulation: int) -> Job:
            data = home / f"data-{length}"
            if not data.exists():
                make_data(data, steps * accumulation * a.gpus // n, length + 64)
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": data,
                "cutoff_len": length,
                "sequence_parallel_size": n,
                "sequence_parallel_mode": "auto",
                "gradient_accumulation_steps": accumulation,
                "max_steps": steps,
                **on_gpus(a, a.gpus),
            }
            name = f"DP {a.gpus // n} x SP {n}, {a.gpus // n * accumulation} rows of {length:,}"
            if layers != 28 and not a.small:
                name += f", {layers} of 28 layers"
            return Job(name, keys)

        by_size = {n: job(n, local * n, 1) for n in sizes}
        spread = {n: job(n, local, n) for n in sizes[1:]}
        # the widest first after SP 1, should time end
        widest = sorted(by_size, key=lambda n: (n > 1, -n))
        jobs = [*(by_size[n] for n in widest), *reversed(spread.values())]

        def tell(name: str, row: Row) -> None:
            if "step s" in row:
                row["tokens/s a GPU"] = row["tokens"] / row["step s"] / a.gpus
            keep(a, {"row": name, **row}, rows)

        found = in_one_group(home, range(a.gpus), jobs, a.end - 10, tell, a.after)
    first = found.get(by_size[1].name, {})
    rate: dict[int, float] = {}
    if not a.smoke and "step s" in first:
        config = {**SHAPES["qwen2.5-7b"], "num_hidden_layers": layers}
        rate = kernel_seconds(config, [local * n for n in sizes])
    for n, at in by_size.items():
        row = found.get(at.name, {})
        if rate and "step s" in row:
            # seconds of a local token: t1 - a1 + a2, each GPU's share of the row's attention
            t1 = 1 / first["tokens/s a GPU"]
            a1, a2 = rate[local] / local, rate[local * n] / (local * n)
            ideal = 1.0 / (t1 - a1 + a2)
            row |= {"ideal": ideal, "over the ideal": row["tokens/s a GPU"] / ideal}
            keep(a, {"row": at.name, **row}, rows)
    for at in spread.values():
        row = found.get(at.name, {})
        if "losses" in row and "losses" in first:
            row["largest relative difference of losses"] = max(
                abs(x - y) / abs(y) for x, y in zip(row["losses"], first["losses"], strict=True)
            )
            keep(a, {"row": at.name, **row}, rows)
    return int(len(found) < len(jobs) or any("error" in r for r in found.values()))


SCALING_NOTE = (
    "Qwen2.5-7B's shape, all parameters, FSDP2 over all GPUs, memory: auto, mode auto, rows of real text;"
    " what `longfactory train` calls, each run in processes of its own that have imported everything;"
    " seconds of the steps after the first. Ideal, for rows of 32,768 tokens times SP: 1 / (t1 - a1 + a2) tokens/s a GPU, t1 the"
    " seconds of a local token at SP 1, a1 and a2 those of attention (all layers, forward and backward,"
    " one GPU's kernel, timed in the same command) at the local and at the whole length. Losses of the"
    " last rows beside those of the first row: the same samples in each step."
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


def parity(a: argparse.Namespace) -> int:
    """Losses of 20 steps, SP over all GPUs and one GPU in bf16, from those of one GPU in float32;
    and the gradients of a tiny model in float32 under every mode, by `longfactory verify`.

    Each seed gives another order of the data and other weights. All runs go at once; a row is
    printed when its runs have ended.
    """
    length, steps, seeds, layers = 4096, 20, a.repeats, None
    if a.small:
        length, layers = 128 if a.smoke else 1024, 2
    rows, found = earlier(a), {}
    one_at_a_time = threading.Lock()
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-0.5b", layers)
        make_data(home / "data", steps, 2 * length)

        def run(kind: str, seed: int, devices: Sequence[int]) -> Job:
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
            return Job(f"{kind}-{seed}", keys)

        def tell(name: str, row: Row) -> None:
            with one_at_a_time:
                found[name] = row
                kind, _, which = name.partition("-")
                if kind != "gradients":
                    ends = [found.get(f"{k}-{which}") for k in ("float32", "one GPU", "all")]
                    if None not in ends:
                        about = f"seed {which}, {steps} steps of {length:,} tokens"
                        keep(a, {"row": about, **distances(a, ends)}, rows)
                    return
                report = home / f"verify-{which}.json"
                if report.exists():
                    row |= verified(json.loads(report.read_text()))
                keep(a, {"row": f"float32, {which}: gradients", **row}, rows)

        every = list(range(a.gpus))
        modes = ("zigzag-ring", "ulysses", "llama3", "usp")
        # two groups side by side on the same GPUs: nothing is timed
        groups = [
            (every, [run("all", s, every) for s in range(0, seeds, 2)]),
            (every, [run("all", s, every) for s in range(1, seeds, 2)]),
            (every, [gradients(a, home, mode) for mode in modes]),
        ]
        for i in every:
            mine = range(i, seeds, a.gpus)
            groups += [([i], [run(k, s, [i]) for s in mine]) for k in ("float32", "one GPU")]
        calls = [
            functools.partial(in_one_group, home, devices, jobs, a.end - 5, tell, a.after)
            for devices, jobs in groups
            if jobs
        ]
        side_by_side(calls, most=2 if a.smoke else len(calls))
    ratios = sorted(r["ratio"] for r in rows if "ratio" in r and not r["row"].startswith("median"))
    if ratios:
        keep(a, {"row": f"median of {len(ratios)}", "ratio": ratios[len(ratios) // 2]}, rows)
    return int(not ratios or any("error" in r for r in found.values()))


PARITY_NOTE = (
    "Qwen2.5-0.5B's shape, random weights, all parameters: root mean square, over the steps, of the"
    " differences of a step's loss (the mean over its tokens) from that of the same run on one GPU in"
    " float32. Gradients: a tiny model in float32, every parameter's gradient beside one process in"
    " float64, by `longfactory verify`."
)


def distances(a: argparse.Namespace, ends: Sequence[Row | None]) -> Row:
    """Of one seed: how far the losses of one GPU and of all in bf16 are from those in float32."""
    runs = [row or {} for row in ends]
    bad = [row["error"] for row in runs if "error" in row]
    if bad:
        return {"error": bad[0]}
    exact, one, every = (row["losses"] for row in runs)
    near, far = rms(one, exact), rms(every, exact)
    return {
        "one GPU from float32 (RMS)": near,
        f"SP {a.gpus} from float32 (RMS)": far,
        "ratio": far / near if near else float("inf"),
        "last loss": exact[-1],
    }


def gradients(a: argparse.Namespace, home: Path, mode: str) -> Job:
    """Every gradient of a tiny model in float32 under a mode, beside one process in float64."""
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
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "bf16": "false",
        "preprocessing_num_workers": 1,
        "report_to": "none",
    }
    return Job(f"gradients-{mode}", keys, "verify", ("--json", str(report)))


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
    """One row of the part `length`. `layers`: of the shape's, None for all. Of two steps the second
    counts; a row of one step is timed with what its first step builds and pins.
    """

    shape: str
    layers: int | None
    tokens: int
    keys: Row
    steps: int = 2
    mode: str = "auto"


MILLION = Long("qwen2.5-7b", None, 1 << 20, SFT | FULL, 1, "zigzag-ring")
LONG: dict[str, Long] = {
    "7B, 1,048,576 tokens, full SFT": MILLION,
    "Qwen3-30B-A3B, 131,072 tokens, full SFT": Long("qwen3-30b-a3b", None, 131072, SFT | FULL),
    "14B, 4 of 48 layers, 524,288 tokens, full SFT": Long("qwen2.5-14b", 4, 1 << 19, SFT | FULL),
    "Qwen3-30B-A3B, 4 of 48 layers, 524,288 tokens, LoRA SFT": Long(
        "qwen3-30b-a3b", 4, 1 << 19, SFT | LORA
    ),
    "7B, 2 of 28 layers, 786,432 tokens, full DPO pair": Long("qwen2.5-7b", 2, 786432, DPO | FULL),
    "7B, 4 of 28 layers, 1,048,576 tokens, full SFT": Long("qwen2.5-7b", 4, 1 << 20, SFT | FULL),
    "14B, 524,288 tokens, full SFT": Long("qwen2.5-14b", None, 1 << 19, SFT | FULL, 1),
    "7B, 786,432 tokens, full DPO pair": Long("qwen2.5-7b", None, 786432, DPO | FULL, 1),
    "Qwen3-30B-A3B, 524,288 tokens, LoRA SFT": Long("qwen3-30b-a3b", None, 1 << 19, SFT | LORA, 1),
}
"""By value. A whole model's step of half a million tokens or more takes minutes, so that further rows
have some of its layers."""


def length(a: argparse.Namespace) -> int:
    """Whole models of one step by the command, one after another; for all others Python starts once."""
    rows, failed = earlier(a), False
    left = {name: at for name, at in LONG.items() if wanted(a, name)}
    if a.small:
        kinds = {f"{at.shape} {at.keys}": name for name, at in left.items()}
        tokens = 1024 if a.smoke else 128
        left = {
            name: at._replace(layers=1, tokens=at.tokens // tokens, steps=2)
            for name, at in left.items()
            if name in kinds.values()
        }

    def tell(name: str, row: Row) -> None:
        nonlocal failed
        at = left.pop(name)
        if "first step s" in row:
            seconds = row.get("step s", row["first step s"])
            row["tokens/s a GPU"] = (row["tokens"] or at.tokens) / seconds / a.gpus
        failed |= "error" in row
        keep(a, {"row": name, **row}, rows)

    while left and a.end - time.time() > 30:
        with workplace() as home:
            name, at = next(iter(left.items()))
            if at.steps == 1:
                keys = long_keys(a, home / "one", at)
                tell(name, train(home, "one", range(a.gpus), keys, a.end - time.time()))
                continue
            jobs = [
                Job(name, long_keys(a, home / str(i), at))
                for i, (name, at) in enumerate(left.items())
                if at.steps > 1
            ]
            in_one_group(home, range(a.gpus), jobs, a.end - 5, tell, a.after)
    for name in list(left):
        tell(name, {"error": "not started: the time of this command was up"})
    return int(failed)


LENGTH_NOTE = (
    "Through `longfactory train`, random weights, nothing saved, FSDP2, bf16 with fp32 master"
    " weights, memory: auto. Where a row has one step, its seconds are those of the first, with"
    " everything that it builds and pins. A pair of DPO: 95 % of its tokens are the prompt that both"
    " answers share; the reference's log-probabilities are computed before the steps."
)


def long_keys(a: argparse.Namespace, home: Path, at: Long) -> Row:
    """Writes model and data; the run's keys."""
    model = model_folder(a, home / "model", at.shape, at.layers)
    stage = at.keys["stage"]
    make_long(home / "data", at.tokens, at.steps, pairs=stage == "dpo")
    return {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "dataset_dir": home / "data",
        "cutoff_len": at.tokens,
        "sequence_parallel_size": a.gpus,
        "sequence_parallel_mode": at.mode,
        "gradient_accumulation_steps": 1,
        "max_steps": at.steps,
        **on_gpus(a, a.gpus),
        **at.keys,
        **({"precompute_ref_log_probs": "true"} if stage == "dpo" else {}),
    }


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
    cases: list[tuple[str, list[int], int | None]] = [
        ("7B", [128 * K], None),
        ("7B, 4 of 28 layers", [512 * K], 4),
    ]
    if a.gpus == 2:
        cases = [("7B, 4 of 28 layers", [64 * K, 128 * K], 4)]
    if a.small:
        cases = [("7B, 2 layers", [512 if a.smoke else 8192], None if a.smoke else 2)]
    rows, failed = earlier(a), False
    clock, log = Clock(a.end - time.time()), log_file("many-gpus-peers")
    for what, lengths, layers in cases:
        ours: dict[int, Row] = {}
        for name, system in (("ours", "LongFactory"), ("alst", "DeepSpeed ALST")):
            keys: Row = {"layers": layers, "steps": 1, "warm": max(lengths) < 256 * K}
            keys |= {"shape": "tiny", "kernel": "cpu"} if a.smoke else {"shape": "7b"}
            if name == "ours":
                keys["mode"] = "auto"
            asked = job(name, lengths, profile=True, **keys)
            for fact in run_row(asked, a.gpus, clock, log):
                tokens = fact.get("tokens") or lengths[0]
                row = peer_row(fact, tokens, a.gpus, ours.get(tokens))
                if "error" in row:
                    print(log.read_text()[-3000:], file=sys.stderr, flush=True)
                    failed = True
                elif name == "ours":
                    ours[tokens] = row
                keep(a, {"row": f"{system}, {what}, {tokens:,} tokens", **row}, rows)
    return int(failed)


def peer_row(fact: Row, tokens: int, gpus: int, ours: Row | None) -> Row:
    """What a system's processes said of a length; beside LongFactory's row, where there is one."""
    if "seconds" not in fact:
        return {"error": fact.get("error", "no result")}
    row: Row = {
        "step s": fact["seconds"],
        "tokens/s a GPU": tokens / gpus / fact["seconds"],
        "peak GiB": fact["peak"] / GiB,
        "kernels": ", ".join(fact.get("kernels", [])),
    }
    spent = {f"{k} ms": v for k, v in fact.get("device_ms", {}).items()}
    if ours is not None:
        row["LongFactory is"] = f"{fact['seconds'] / ours['step s']:.2f}x"
        if spent:
            more = {k: v - ours[k] for k, v in spent.items() if k in ours and k != "messages ms"}
            row["more than LongFactory"] = ", ".join(f"{k} {v:+.0f}" for k, v in more.items())
    return row | spent


PEERS_NOTE = (
    "Complete training steps (`_peers.py`): full parameters, AdamW with exact fp32 weights and states"
    " sharded over the GPUs, random tokens. Milliseconds are of one further step on the first rank,"
    " under the profiler: sums of kernels by kind, messages (with waiting for other ranks), of these"
    " what no other kernel hides (exposed), and the time in which nothing runs (idle). `more than"
    " LongFactory` divides the difference: attention is what is computed a second time, exposed the"
    " exchange, the rest norms, copies and casts."
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
    "packed": packed,
    "scaling": scaling,
    "length": length,
    "peers": peers,
    "parity": parity,
    "resume": resume,
}


TITLES = {
    "attention": "Attention over the GPUs of one machine",
    "packed": "Packed rows: what binds",
    "scaling": "Sequence parallelism: tokens a second of a GPU as a row is spread wider",
    "length": "The longest rows",
    "peers": "Beside DeepSpeed ALST",
    "resume": "Resumed over half of the GPUs",
    "parity": "bf16 with sequence parallelism, as far from float32 as one GPU?",
}


NOTES = {
    "attention": [ATTENTION_NOTE],
    "packed": [PACKED_NOTE],
    "scaling": [SCALING_NOTE],
    "length": [LENGTH_NOTE],
    "peers": [PEERS_NOTE],
    "parity": [PARITY_NOTE],
}


if __name__ == "__main__":
    raise SystemExit(main())
