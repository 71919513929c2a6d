"""Training of a vision-language model on long rows of images and of video through `longfactory
train`, sharded over the GPUs of one machine and on one GPU at the same local length.

    python benchmarks/vision.py --gpus 2 --out benchmarks/results

Qwen3-VL-8B's shape with random weights and the whole tower (`--layers` text layers of 36), LoRA on
the text model, in bf16. A row is 32 images of 1024 x 1024 in 64k tokens, or a video of 512 frames
of 512 x 1024 (131,072 tokens of frames; `--frames`); the same rows for DPO are the prompt of a pair.
Pictures are JPEG files, which the run's own loader decodes.

`of the ideal`: a run of one GPU on a row of half the length with half the images, attention's time
of a token replaced by that of the whole length, as measured on one GPU; only of runs on the same
machine. The first step of a run is not timed. Rows are more than loader processes, so that their
pixels are made while steps are timed. Host
memory is what the processes of a run hold at most, shared memory counted once (PSS). Beside it
transformers' own loop on one GPU: the same model with PEFT, its own checkpointing, its own loss,
pixels that are in memory already.

The processes of all rows are started once, and each row's run begins in them as the command begins
it: what Python takes to start is not paid for each row. A row that fails is tried once more through
the command itself, and is in the table with its reason if that fails too. Earlier rows in `--out`
stay in the table unless they are run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "src"))
import _profile  # noqa: E402
import _vision_rows  # noqa: E402
from _table import LEAST, Clock, command_line, machine_name  # noqa: E402
from longfactory.testing import RankError, RankPool  # noqa: E402
from plan_accuracy import ended_in_time  # noqa: E402

EXAMPLE = ROOT / "examples" / "vision" / "model"
"""Its tokenizer has a token for each byte, and the placeholders."""
TEXT = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 21,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
    },
    "pad_token_id": 0,
    "eos_token_id": 2,
}
TOWER = {
    "model_type": "qwen3_vl_vision",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
SMALL_TEXT = TEXT | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
SMALL_TOWER = TOWER | {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
EDGE = 2**31  # pixels of a video, at most: no frame is made smaller
MERGED = 32  # pixels of a token's side


class Case(NamedTuple):
    """What a row shows. `side`: width and height of a picture."""

    name: str
    pictures: int
    side: tuple[int, int]
    tokens: int

    @property
    def video(self) -> bool:
        return self.name == "video"

    def part(self, share: int) -> Case:
        """A row of one n-th of it."""
        return self._replace(pictures=self.pictures // share, tokens=self.tokens // share)


def cases(small: bool, frames: int) -> dict[str, Case]:
    if small:
        every = (Case("images", 8, (128, 128), 512), Case("video", 16, (128, 64), 256))
    else:
        video = (frames // 2) * (512 * 1024 // MERGED**2 + 20)  # and a time stamp for each pair
        every = (
            Case("images", 32, (1024, 1024), 65536),
            Case("video", frames, (1024, 512), video + 4096),
        )
    return {case.name: case for case in every}


# ---- model and data ------------------------------------------------------------------------------


def write_model(folder: Path, layers: int, small: bool) -> Path:
    """A model's folder without weights."""
    shutil.copytree(EXAMPLE, folder)
    config = json.loads((EXAMPLE / "config.json").read_text())
    text, tower = (SMALL_TEXT, SMALL_TOWER) if small else (TEXT, TOWER)
    config["text_config"] = text | {"num_hidden_layers": layers}
    config["vision_config"] = tower
    config["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((EXAMPLE / name).read_text())
        settings["size"] = {"shortest_edge": 1024, "longest_edge": EDGE}
        (folder / name).write_text(json.dumps(settings))
    return folder


def write_pictures(folder: Path, case: Case) -> list[str]:
    """Files of pictures, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = case.side
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.uint8)
    grain = draw.integers(0, 12, smooth.shape, np.uint8)
    base = smooth // 2 + 32 + grain

    def write(number: int) -> str:
        shown = np.roll(base, (3 * number, 7 * number), (0, 1))
        out = io.BytesIO()
        Image.fromarray(shown).save(out, "JPEG", quality=90)
        name = f"{case.name}-{number}.jpg"
        (folder / name).write_bytes(out.getvalue())
        return name

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, range(case.pictures)))


def write_data(folder: Path, every: dict[str, Case], shares: tuple[int, ...], rows: int) -> None:
    """Answers and pairs of answers to what shows the pictures: data sets `images-1`,
    `images-1-pairs`, ... by the share of the row.
    """
    info: dict[str, Any] = {}
    draw = random.Random(0)

    def text(tokens: int) -> str:
        letters = draw.choices("abcdefghijklmnopqrstuvwxyz     ", k=max(1, tokens - 1))
        return "a" + "".join(letters)

    for whole in every.values():
        names = write_pictures(folder, whole)
        for share in shares:
            case = whole.part(share)
            shown = names[: case.pictures]
            each = case.side[0] * case.side[1] // MERGED**2 + 2
            answer = case.tokens // 64
            samples = []
            for _ in range(rows):
                if case.video:
                    asked = "<video>" + text(32)
                    found: dict[str, Any] = {"videos": [shown]}
                else:
                    room = (case.tokens - 2 * answer - 128) // case.pictures - each
                    asked = "".join("<image>" + text(room) for _ in shown)
                    found = {"images": shown}
                answers = {"output": text(answer)}
                pair = {"chosen": text(answer), "rejected": text(answer)}
                samples.append({"instruction": asked, **answers, **pair, **found})
            name = f"{case.name}-{share}"
            (folder / f"{name}.json").write_text(json.dumps(samples))
            media = {"videos": "videos"} if case.video else {"images": "images"}
            plain = {"prompt": "instruction", **media}
            info[name] = {
                "file_name": f"{name}.json",
                "columns": {**plain, "response": "output"},
            }
            info[f"{name}-pairs"] = {
                "file_name": f"{name}.json",
                "ranking": True,
                "columns": {**plain, "chosen": "chosen", "rejected": "rejected"},
            }
    (folder / "dataset_info.json").write_text(json.dumps(info))


# ---- runs ----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A row of the table. `system`: ours, or transformers' own. `share`: of the whole row."""

    case: Case
    gpus: int
    share: int
    stage: str = "sft"
    system: str = "ours"

    @property
    def name(self) -> str:
        end = "" if self.system == "ours" else ", transformers' own"
        return f"{self.case.name}, {self.stage}{end}"

    @property
    def out(self) -> str:
        return f"out-{self.case.name}-{self.stage}-{self.gpus}"


def words_of(job: Job, args: argparse.Namespace, home: Path) -> list[str]:
    """The run's keys."""
    case = job.case.part(job.share)
    stage: dict[str, Any] = {"stage": "sft", "dataset": f"{case.name}-{job.share}"}
    if job.stage == "dpo":
        stage = {"stage": "dpo", "dataset": f"{case.name}-{job.share}-pairs"}
    sharding = {"sharding": "ddp" if args.smoke else "fsdp2"}
    keys = {
        "model_name_or_path": home / "model",
        "train_from_scratch": "true",
        "template": "qwen3_vl_nothink",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        **stage,
        "dataset_dir": home / "data",
        "media_dir": home / "data",
        "image_max_pixels": case.side[0] * case.side[1],
        "video_max_pixels": case.side[0] * case.side[1],
        "video_maxlen": max(2, case.pictures),
        "cutoff_len": 2 * case.tokens,
        "packing": "false",
        "sequence_parallel_size": job.gpus,
        "nproc_per_node": job.gpus,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps + (2 if args.profile else 0),
        "learning_rate": "1e-5",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_final_model": "false",
        "output_dir": home / job.out,
        "overwrite_output_dir": "true",
        "report_to": "none",
        "preprocessing_num_workers": 1 if args.smoke else args.steps,
        **({} if args.workers < 0 else {"dataloader_num_workers": args.workers}),
        **(_profile.RECORDED | {"profiler_wait_steps": args.steps} if args.profile else {}),
        **({} if args.smoke else {"bf16": "true"}),
        **(sharding if job.gpus > 1 else {}),
        **dict(word.split("=", 1) for word in args.keys),
    }
    return [f"{key}={value}" for key, value in keys.items()]


def run_in(
    pool: RankPool, job: Job, args: argparse.Namespace, home: Path, limit: float
) -> dict[str, Any]:
    """A run in processes that stay: what its log says of the steps after the first."""
    turns, own, other = None, home / f"ready-{job.gpus}", home / "ready-0"
    if args.turns and job.stage == "sft":
        other = home / (f"ready-{args.gpus}" if job.gpus == 1 else "alone-done")
        turns = _vision_rows.Turns(str(own), str(other), limit)
    try:
        return _run_in(pool, job, args, home, limit, turns)
    finally:
        own.touch()


def _run_in(
    pool: RankPool,
    job: Job,
    args: argparse.Namespace,
    home: Path,
    limit: float,
    turns: _vision_rows.Turns | None,
) -> dict[str, Any]:
    begun = time.time()
    memory = HostMemory(pool)
    try:
        with memory:
            words, cache = words_of(job, args, home), str(home / "cache")
            text, after = pool.run(_vision_rows.train, words, cache, turns, timeout=limit)[0]
        said = "; ".join(f"{seconds:.0f} s {line}" for seconds, line in after)
        print(f"{job.name}, {job.gpus} GPUs: {said}", flush=True)
        _profile.print_traces(job.name, home / job.out / "profiler")
    except RankError as error:
        print(str(error)[-2500:], flush=True)
        left = limit - (time.time() - begun)
        if left < 40:
            return {"error": _reason(str(error))}
        text = by_command(job, args, home, left)
    return logged(job, args, home, text) | {
        "seconds_in_all": round(time.time() - begun),
        "host_gib": memory.most / 2**30,
    }


def by_command(job: Job, args: argparse.Namespace, home: Path, limit: float) -> str:
    """The same run by the command, in processes of its own. Returns what it wrote."""
    command = [sys.executable, "-m", "longfactory.cli", "train", *words_of(job, args, home)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "LONGFACTORY_CACHE": str(home / "cache"),
    }
    code, text = ended_in_time(command, env, limit)
    if code:
        print(text[-2500:], flush=True)
    return text


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("longfactory:")]
    return (errors or lines or ["no output"])[-1][:250]


def logged(job: Job, args: argparse.Namespace, home: Path, text: str) -> dict[str, Any]:
    """What a run's log says of the steps after the first."""
    log = home / job.out / "trainer_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if "loss" in line][: args.steps]
    timed = lines[1:]
    if not timed:
        return {"error": _reason(text)}
    at = [line["elapsed_seconds"] for line in lines]
    seconds = (at[-1] - at[0]) / len(timed)
    plan = re.search(r"Memory plan.*\n +(.*)", text)
    said = re.search(r"predicted: ([\d.]+) s (?:a|per) row", text)
    # Tokens of documents a second of each GPU, while a step runs: of a step, its tokens.
    steps = [x["tokens_per_second_per_gpu"] * x["seconds_per_step"] * job.gpus for x in timed]
    tokens = sum(steps) / len(steps)
    width = int(str((SMALL_TEXT if args.smoke else TEXT)["hidden_size"]))
    return {
        "tokens": round(tokens),
        "seconds": seconds,
        "tokens_per_s_gpu": tokens / seconds / job.gpus,
        "peak_gib": max(line.get("vram_allocated", 0.0) for line in lines),
        "embeddings_gib": tokens / job.gpus * width * 2 / 2**30,
        "data_wait": sum(line.get("data_wait", 0.0) for line in timed) / len(timed),
        "settings": "" if plan is None else plan[1],
        "predicted": None if said is None else float(said[1]),
        "loss": lines[-1]["loss"],
        "steps": len(lines),
        "first_waited": round(lines[0].get("data_wait", 0.0) * lines[0]["seconds_per_step"], 1),
        "each_step": [round(b - a, 2) for a, b in itertools.pairwise([0.0, *at])],
    }


class HostMemory:
    """The most that a pool's processes and those that they started hold, in bytes, while it is
    open.
    """

    def __init__(self, pool: RankPool) -> None:
        self.most = 0
        self.pool = pool
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(1.0):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        parents: dict[int, int] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                after_name = (process / "stat").read_text().rsplit(")", 1)[1]
                parents[int(process.name)] = int(after_name.split()[1])
        held, roots = 0, {process.pid for process in self.pool._processes}
        for number in parents:
            at = number
            while at in parents and at not in roots:
                at = parents[at]
            if at not in roots:
                continue
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{number}/smaps_rollup").read_text()
                found = re.search(r"^Pss: +(\d+)", text, re.MULTILINE)
                held += 0 if found is None else 1024 * int(found[1])
        return held


def beside(
    pool: RankPool, job: Job, args: argparse.Namespace, home: Path, limit: float
) -> dict[str, Any]:
    """Attention's seconds at the length of a GPU's part of the row, then transformers' own loop on
    such a row.
    """
    case, begun, model = job.case.part(job.share), time.time(), str(home / "model")
    found: dict[str, Any] = {}
    try:
        length = case.tokens // 64 * 64
        found["rates"] = pool.run(
            _vision_rows.attention, model, length, args.smoke, timeout=limit / 2
        )[0]
        found["tower"] = pool.run(
            _vision_rows.tower, model, case.side, case.video, args.smoke, timeout=limit / 2
        )[0]
        if job.case.name in args.peers:
            given = (model, case.video, case.pictures, case.side, case.tokens, args.steps)
            left = limit - (time.time() - begun)
            found |= pool.run(_vision_rows.peer, *given, args.smoke, timeout=left)[0]
    except RankError as error:
        print(str(error)[-1500:], flush=True)
        found["error"] = _reason(str(error))
    return found | {"seconds_in_all": round(time.time() - begun)}


# ---- all rows ------------------------------------------------------------------------------------


def ideal(one: dict[str, Any], rates: dict[str, float], tokens: float, again: bool) -> float:
    """Tokens a second of each GPU, from one GPU's step with attention at the whole length."""
    seconds = (1 + again) * rates["forward"] + rates["backward"]

    def of_a_token(length: float) -> float:
        return seconds * (length / rates["length"]) ** 2 / length

    whole = one["seconds"] / one["tokens"] - of_a_token(one["tokens"]) + of_a_token(tokens)
    return 1 / whole


def table(rows: list[dict[str, Any]], headers: list[str]) -> str:
    out = [
        "# Images and video",
        "",
        *headers,
        "",
        "| row | GPUs | tokens | s a step (each) | tokens/s a GPU | of the ideal | peak GiB a GPU"
        " | of it embeddings | host GiB | decode wait | settings |",
        "|" + "---|" * 11,
    ]
    good = [r for r in rows if "error" not in r and "tokens" in r]
    rates = {r["case"]: r["rates"] for r in rows if "rates" in r}
    machines = {r["case"]: r.get("machine") for r in rows if "rates" in r}
    for r in rows:
        start = f"| {r['row']} | {r['gpus']} |"
        if r not in good:
            out.append(f"{start} {r.get('error', 'attention alone')} |" + " |" * 8)
            continue
        ones = [
            o
            for o in good
            if (o["case"], o["stage"], o["gpus"], o["system"]) == (r["case"], "sft", 1, "ours")
            and o.get("machine") == r.get("machine") == machines.get(r["case"])
        ]
        share = ""
        if r["gpus"] > 1 and r["stage"] == "sft" and ones:
            again = "attention outputs saved in 100%" not in r["settings"]
            again = again and "every activation stored" not in r["settings"]
            best = ideal(ones[0], rates[r["case"]], r["tokens"], again)
            share = f"{r['tokens_per_s_gpu'] / best:.2f}"
        each = r.get("each_step", [])[1:]
        single = f" ({', '.join(f'{seconds:.2f}' for seconds in each)})" if each else ""
        cells = [
            f"{r['tokens']:,}",
            f"{r['seconds']:.2f}{single}",
            f"{r['tokens_per_s_gpu']:,.0f}",
            share,
            f"{r['peak_gib']:.1f}",
        ]
        if r["system"] == "ours":
            of_peak = r["embeddings_gib"] / r["peak_gib"] if r["peak_gib"] else 0.0
            cells += [f"{r['embeddings_gib']:.2f} GiB, {of_peak:.1%}", f"{r['host_gib']:.1f}"]
            told = f"; {r['predicted']:.2f} s predicted" if r.get("predicted") else ""
            cells += [f"{r['data_wait']:.1%}", r["settings"] + told]
        else:
            cells += ["", "", "", r.get("settings", "")]
        out.append(f"{start} " + " | ".join(cells) + " |")
    out.append("")
    for case, found in rates.items():
        out.append(
            f"Attention of all layers, {case}, one GPU, {found['length']:,} tokens: forward"
            f" {found['forward']:.3f} s, backward {found['backward']:.3f} s."
        )
    for r in rows:
        if "tower" in r:
            found = r["tower"]
            out.append(
                f"The tower, {r['case']}, frozen, one GPU: {found['seconds']:.3f} s for"
                f" {found['patches']:,} patches ({found['patches'] // 4:,} tokens)."
            )
    return "\n".join(out) + "\n"


def earlier(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows that were measured before, and what was said of them. Those that failed are left out."""
    if not path.is_file():
        return [], []
    found = json.loads(path.read_text())
    return [row for row in found["rows"] if "tokens" in row or "rates" in row], found["headers"]


def measure(args: argparse.Namespace, home: Path) -> int:
    import torch
    import transformers

    clock = Clock(args.seconds)
    shared = shutil.disk_usage("/dev/shm").free / 2**30
    if args.smoke:
        args.workers = 1
    os.environ["RECORD_VRAM"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    threads = max(1, (os.cpu_count() or 1) // args.gpus // 2)
    backend = "gloo" if args.smoke else "nccl"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
    every = cases(args.smoke, args.frames)
    chosen = [every[name] for name in args.cases]
    of_pairs = [every[name] for name in args.dpo_cases or args.cases]
    visible = len(shown.split(","))
    # Each case has a GPU of its own; where GPUs are left, what is measured beside it another one.
    lanes: list[list[Job]] = []
    for case in chosen:
        own = [Job(case, 1, args.gpus)] if "one" in args.parts else []
        other = [Job(case, 1, args.gpus, system="transformers")] if "beside" in args.parts else []
        lanes += [own, other] if len(chosen) < visible and not args.turns else [own + other]
    lanes = [lane for lane in lanes if lane]
    pools = []
    for number in range(len(lanes)):
        pools.append(RankPool(1, threads, backend))
        os.environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[number % visible]
        pools[-1].start()
    os.environ["CUDA_VISIBLE_DEVICES"] = shown
    together = RankPool(args.gpus, threads, backend)
    if {"all", "dpo"} & set(args.parts):
        together.start()
    write_model(home / "model", args.layers, args.smoke)
    wanted = {case.name: case for case in [*chosen, *of_pairs]}
    write_data(home / "data", wanted, tuple({1, args.gpus}), args.steps)
    print(
        f"{args.seconds - clock.left:.0f} s: model and data written; /dev/shm {shared:.0f} GiB,"
        f" {os.cpu_count()} cores",
        flush=True,
    )
    header = (
        f"Qwen3-VL-8B's shape, {args.layers} of 36 text layers, LoRA, tower frozen, {machine_name()},"
        f" torch {torch.__version__}, transformers {transformers.__version__}; `{command_line()}`,"
        f" {datetime.datetime.now(datetime.UTC).date().isoformat()}"
    )
    path = args.out / f"vision_{args.gpus}_gpus_{args.layers}_layers.json"
    rows, headers = earlier(path) if not args.smoke else ([], [])
    headers.append(header)
    lock = threading.Lock()
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]

    def one(job: Job, pool: RankPool) -> None:
        if clock.left < LEAST:
            print(f"{job.name}, {job.gpus} GPUs: not started, the time is up", flush=True)
            return
        about = {
            "row": job.name,
            "case": job.case.name,
            "gpus": job.gpus,
            "stage": job.stage,
            "system": job.system,
            "machine": machine,
        }
        start = run_in if job.system == "ours" else beside
        try:
            found = start(pool, job, args, home, min(args.each, clock.left))
        except Exception as error:  # one row must not end the others
            found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        with lock:
            new = about | found
            rows[:] = [r for r in rows if (r["row"], r["gpus"]) != (new["row"], new["gpus"])]
            rows.append(new)
            print(f"{args.seconds - clock.left:.0f} s: " + json.dumps(new), flush=True)
            if not args.smoke:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"headers": headers, "rows": rows}, indent=1) + "\n")
                path.with_suffix(".md").write_text(table(rows, headers))

    def alone(pool: RankPool, lane: list[Job]) -> None:
        for job in lane:
            one(job, pool)
        pool.stop()

    shared_rows = [
        Job(case, args.gpus, 1, stage)
        for part, stage, of_part in (("all", "sft", chosen), ("dpo", "dpo", of_pairs))
        if part in args.parts
        for case in of_part
    ]

    def before() -> None:
        """What a run of all GPUs does before it needs one, while single GPUs compute; with turns,
        its first step too.
        """
        for job in shared_rows[:1]:
            words = words_of(job, args, home)
            together.run(_vision_rows.tokenise, words, str(home / "cache"), timeout=args.each)
            if args.turns:
                one(shared_rows.pop(0), together)

    with concurrent.futures.ThreadPoolExecutor(len(lanes) + 1) as executor:
        ready = executor.submit(before) if lanes else None
        list(executor.map(alone, pools, lanes))
        (home / "alone-done").touch()
    if ready is not None and (error := ready.exception()):
        print(f"tokenising: {str(error)[-1500:]}", flush=True)
    for job in shared_rows:
        one(job, together)
    together.stop()
    print(table(rows, headers), flush=True)
    return int(args.smoke and any("error" in r for r in rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--gpus", type=int, default=2, help="that share a row")
    parser.add_argument("--layers", type=int, default=12, help="text layers, of 36")
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--frames", type=int, default=512, help="of the video")
    parser.add_argument("--cases", nargs="+", default=["images", "video"])
    parser.add_argument("--parts", nargs="+", default=["one", "all", "beside", "dpo"])
    parser.add_argument("--dpo-cases", nargs="+", help="of the part dpo; as --cases if not given")
    parser.add_argument("--peers", nargs="*", default=["images", "video"])
    parser.add_argument("--keys", nargs="*", default=[], help="further keys of the runs, key=value")
    parser.add_argument(
        "--workers", type=int, default=-1, help="loader processes of a rank; -1: not given"
    )
    parser.add_argument("--each", type=float, default=150, help="seconds for one row")
    parser.add_argument("--seconds", type=float, default=235, help="of the whole command")
    parser.add_argument(
        "--turns",
        action="store_true",
        help="the run of all GPUs makes its first step while the one of one GPU does, and waits"
        " for its turn then: both are in memory (--keys keep_mlp=0.5)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="two steps more, of which one is recorded: where each GPU's time goes",
    )
    parser.add_argument("--render", type=Path, help="only write the table of a file of results")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if args.render:
        found = json.loads(args.render.read_text())
        args.render.with_suffix(".md").write_text(table(found["rows"], found["headers"]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
