"""What the memory plan predicts of a run beside what the run took, through `longfactory train` on
the GPUs of one machine.

    python benchmarks/plan_accuracy.py --gpus 1 --out benchmarks/results
    python benchmarks/plan_accuracy.py --gpus 2 --only 7b-full-32k moe-full-32k --out benchmarks/results
    python benchmarks/plan_accuracy.py --check          # no GPU: every setting is planned, not run
    python benchmarks/plan_accuracy.py --again benchmarks/results/plan_accuracy.json   # no GPU

Each setting is a run of a few steps with random weights, whose log holds the plan that it made
before it loaded anything (`longfactory plan` prints the same). Predicted are the peak of one GPU and
the seconds of a step; measured are the most bytes that torch had allocated, and the median of the
steps after the first (rows without `steps`: the mean). What torch does not allocate (the item
"runtime") is left out of the predicted peak. Settings of one GPU run side by side where the machine has more. Nothing is left out: a
setting that fails is in the table with its last line. With `--out`, earlier settings stay in the
table unless they are run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import itertools
import json
import os
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _table import MARK, command_line, end_marked, machine_name, of_visible  # noqa: E402
from longfactory.plan.sizes import SIZES  # noqa: E402
from make_model import LONG, QWEN, SHAPES, make_model  # noqa: E402

FURTHER: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": QWEN | SIZES["1.5b"][1] | LONG,
    "qwen3-30b-a3b": QWEN | SIZES["qwen3-30b-a3b"][1] | LONG,
    "gemma-3-12b": SIZES["gemma-3-12b"][1]
    | LONG
    | {
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-20b": SIZES["gpt-oss-20b"][1]
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "max_position_embeddings": 1 << 21,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "max_position_embeddings": 1 << 21,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    },
}
PT: dict[str, Any] = {"stage": "pt", "dataset": "long"}
SFT: dict[str, Any] = {"stage": "sft", "dataset": "answers", "template": "chatml"}
DPO: dict[str, Any] = {"stage": "dpo", "dataset": "pairs", "template": "chatml"}
FULL: dict[str, Any] = {"finetuning_type": "full"}
LORA: dict[str, Any] = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
QLORA = LORA | {"quantization_bit": 4}
HOST: dict[str, Any] = {"optimizer_placement": "host"}


class Setting(NamedTuple):
    """`layers`: None for all of the shape's. `tokens`: cutoff_len; a pair of DPO is up to twice as
    long. `gpus`: the numbers of GPUs that it is for.
    """

    shape: str
    layers: int | None
    tokens: int
    keys: dict[str, Any]
    gpus: tuple[int, ...] = (1, 2)


SETTINGS: dict[str, Setting] = {
    "1.5b-full-16k": Setting("qwen2.5-1.5b", None, 16384, PT | FULL, (1,)),
    "1.5b-full-64k": Setting("qwen2.5-1.5b", None, 65536, SFT | FULL, (1,)),
    "1.5b-dpo-full-16k": Setting("qwen2.5-1.5b", None, 8192, DPO | FULL),
    "1.5b-4-layers-full-256k": Setting("qwen2.5-1.5b", 4, 262144, PT | FULL, (1,)),
    "1.5b-full-ddp-32k": Setting(
        "qwen2.5-1.5b", None, 32768, PT | FULL | {"sharding": "ddp"}, (2,)
    ),
    "7b-full-32k": Setting("qwen2.5-7b", None, 32768, SFT | FULL, (2,)),
    "7b-full-host-16k": Setting("qwen2.5-7b", None, 16384, PT | FULL | HOST, (1,)),
    "7b-8-layers-full-64k": Setting("qwen2.5-7b", 8, 65536, PT | FULL),
    "7b-2-layers-full-512k": Setting("qwen2.5-7b", 2, 524288, PT | FULL, (2,)),
    "7b-lora-32k": Setting("qwen2.5-7b", None, 32768, SFT | LORA),
    "7b-dpo-lora-16k": Setting("qwen2.5-7b", None, 8192, DPO | LORA, (1,)),
    "7b-qlora-32k": Setting("qwen2.5-7b", None, 32768, SFT | QLORA),
    "14b-lora-16k": Setting("qwen2.5-14b", None, 16384, SFT | LORA),
    "14b-8-layers-full-32k": Setting("qwen2.5-14b", 8, 32768, PT | FULL),
    "moe-6-layers-full-16k": Setting("qwen3-30b-a3b", 6, 16384, PT | FULL),
    "moe-6-layers-lora-32k": Setting("qwen3-30b-a3b", 6, 32768, SFT | LORA),
    # experts' temporaries, near the memory of one H200
    "moe-6-layers-full-128k": Setting("qwen3-30b-a3b", 6, 131072, PT | FULL, (1,)),
    "moe-6-layers-lora-128k": Setting("qwen3-30b-a3b", 6, 131072, PT | LORA, (1,)),
    "gpt-oss-6-layers-full-96k": Setting("gpt-oss-20b", 6, 98304, PT | FULL, (1,)),
    "gpt-oss-6-layers-lora-128k": Setting("gpt-oss-20b", 6, 131072, PT | LORA, (1,)),
    "gemma-12-layers-full-32k": Setting("gemma-3-12b", 12, 32768, PT | FULL),
    "gemma-12-layers-lora-64k": Setting("gemma-3-12b", 12, 65536, SFT | LORA),
    # windows and sinks, and recurrent layers, where attention is most of a step
    "gpt-oss-4-layers-full-131k": Setting("gpt-oss-20b", 4, 131072, PT | FULL, (1,)),
    "hybrid-8-layers-full-131k": Setting("qwen3.5-9b", 8, 131072, PT | FULL, (1,)),
    # steps that are shorter than what the host has to start
    "1.5b-full-4k": Setting("qwen2.5-1.5b", None, 4096, PT | FULL),
    "7b-lora-2k": Setting("qwen2.5-7b", None, 2048, SFT | LORA),
}


def make_data(folder: Path, rows: int, tokens: int) -> None:
    """Long texts, answers and pairs of answers from Python's manual, each longer than `tokens`."""
    import pydoc_data.topics

    topics = sorted(pydoc_data.topics.topics.values())
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(0)

    def text() -> str:
        found = ""
        while len(found) < 4 * tokens:
            found += "\n\n".join(order.sample(topics, len(topics)))
        return found[: 4 * tokens]

    asked = {"instruction": "Print Python's manual."}
    kinds: dict[str, list[dict[str, str]]] = {
        "long": [{"text": text()} for _ in range(rows)],
        "answers": [{**asked, "output": text()} for _ in range(rows)],
        "pairs": [{**asked, "chosen": text(), "rejected": text()} for _ in range(rows)],
    }
    info: dict[str, Any] = {}
    for name, samples in kinds.items():
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"{name}.jsonl").write_text(lines)
        info[name] = {"file_name": f"{name}.jsonl"}
    info["long"]["columns"] = {"prompt": "text"}
    info["pairs"]["ranking"] = True
    info["pairs"]["columns"] = {
        "prompt": "instruction",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def write_shape(shape: str, layers: int | None, folder: Path) -> Path:
    """A model folder of a shape, with another number of layers if asked."""
    make_model(shape if shape in SHAPES else "qwen2.5-7b", folder)
    config = dict(SHAPES.get(shape) or FURTHER[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_weights(model: Path, folder: Path) -> Path:
    """The folder of a model with random weights in bf16 (norms are ones, biases zeros), which
    quantisation reads. What is written are parts of one random block, by several threads.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    if folder.exists():
        return folder
    shutil.copytree(model, folder)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model), dtype=torch.bfloat16
        )
        tied = set(getattr(made, "all_tied_weights_keys", None) or ())
        state = {k: v for k, v in made.state_dict().items() if k not in tied}
        state = revert_weight_conversion(made, state)
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, tensor in state.items():
        if held > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.numel()
    names = {
        name: f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i, shard in enumerate(shards)
        for name in shard
    }
    size = 2 * sum(t.numel() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    vector = torch.ones(1 << 20, dtype=torch.bfloat16)
    numbers, ones, zeros = (
        memoryview(x.view(torch.uint8).numpy()).cast("B") for x in (block, vector, 0 * vector)
    )

    def write(shard: dict[str, Any]) -> None:
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, t in shard.items():
            header[name] = {
                "dtype": "BF16",
                "shape": list(t.shape),
                "data_offsets": [at, at + 2 * t.numel()],
            }
            at += 2 * t.numel()
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / names[next(iter(shard))], "wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for i, (name, t) in enumerate(shard.items()):
                source = numbers
                if t.dim() == 1:
                    source = zeros if name.endswith("bias") else ones
                start, left = 2 * (i * 4099 % (len(source) // 4)), 2 * t.numel()
                while left:
                    left -= file.write(source[start : start + left])
                    start = 0

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(write, shards))
    return folder


SHARD, BLOCK = 2 * 10**9, 1 << 25  # numbers


def keys_of(
    name: str, at: Setting, gpus: int, steps: int, home: Path, weights: bool = True
) -> dict[str, Any]:
    """The run's keys, with its model and data written; `weights`: those that quantisation reads."""
    data = home / f"data-{at.tokens}"
    with WRITING:
        if not data.exists():
            make_data(data, 4, at.tokens)
        model = write_shape(at.shape, at.layers, home / f"model-{at.shape}-{at.layers}")
        quantised = "quantization_bit" in at.keys
        if quantised and weights:
            model = write_weights(model, home / f"weights-{at.shape}-{at.layers}")
    return {
        "model_name_or_path": model,
        **({} if quantised else {"train_from_scratch": "true"}),
        "dataset_dir": data,
        "cutoff_len": at.tokens,
        "packing": "false",
        "sequence_parallel_size": gpus,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": "1e-5",
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": home / f"out-{name}",
        "overwrite_output_dir": "true",
        "include_num_input_tokens_seen": "true",
        "report_to": "none",
        "save_final_model": "false",
        "bf16": "true",
        "preprocessing_num_workers": 1,
        **({"sharding": "fsdp2"} if gpus > 1 and "sharding" not in at.keys else {}),
        **at.keys,
    }


def run(
    name: str,
    at: Setting,
    gpus: int,
    steps: int,
    home: Path,
    devices: str | None = None,
    limit: float | None = None,
    timed: int | None = None,
) -> dict[str, Any]:
    """One setting: what was predicted and what was measured.

    Args:
        devices: as CUDA_VISIBLE_DEVICES.
        limit: seconds after which the run is ended, which is its error then.
        timed: the first steps, whose time is taken (but the very first's); by default all.
    """
    keys = keys_of(name, at, gpus, steps, home) | {"nproc_per_node": gpus}
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    command += [f"{key}={value}" for key, value in keys.items()]
    env = {**os.environ, "RECORD_VRAM": "1", "LONGFACTORY_CACHE": str(home / "cache")}
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = devices
    begun = time.time()
    code, text = ended_in_time(command, env, limit)
    row: dict[str, Any] = {
        "name": name,
        "gpus": gpus,
        "shape": at.shape,
        "layers": at.layers,
        "tokens": at.tokens,
        "keys": at.keys,
        "seconds_in_all": round(time.time() - begun),
    }
    if code:
        last = [line for line in text.splitlines() if line.strip()]
        why = last[-1][:300] if last else "no output"
        if code == TOO_LONG:
            why = f"ended after {limit:.0f} s: {why}"
        return {**row, "error": why, "log": text[-4000:]}
    return {**row, **of_run(text, home / f"out-{name}", timed)}


def of_run(text: str, out: Path, timed: int | None = None) -> dict[str, Any]:
    """What a run took and what its plan had said.

    Args:
        text: all that it wrote.
        out: its output_dir, with its log.
        timed: as of `run`.
    """
    total = re.search(r"^ +total +([0-9.]+) +of", text, re.MULTILINE)
    runtime = re.search(r"^ +runtime +([0-9.]+)$", text, re.MULTILINE)
    step = re.search(r"predicted: ([0-9.]+) s (?:a|per) row", text)
    logged = (out / "trainer_log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in logged if '"loss"' in line]
    predicted: dict[str, Any] = {}
    if total is not None and step is not None and runtime is not None:  # not on CPUs
        predicted["predicted_gib"] = round(float(total[1]) - float(runtime[1]), 1)
        predicted["predicted_seconds"] = float(step[1])
    clocks = [line["elapsed_seconds"] for line in lines[:timed]]
    taken = [after - before for before, after in itertools.pairwise(clocks)]
    kernels = re.search(r"Attention kernels? \(.*?\): (.*)", text)
    said = ("expert_max_load", "expert_dead")  # of a mixture of experts
    plan = re.search(r"Memory plan.*\n +(.*)", text)
    return {
        **({} if plan is None else {"settings": plan[1]}),
        "loss": lines[-1]["loss"],
        **({} if kernels is None else {"kernels": kernels[1]}),
        **{key: lines[-1][key] for key in said if key in lines[-1]},
        **predicted,
        "peak_gib": max(line.get("vram_allocated", 0.0) for line in lines),
        "step_seconds": statistics.median(taken),
        "steps": [round(each, 4) for each in taken],
        "split": "split masters" in text,
    }


TOO_LONG = -1


def ended_in_time(command: list[str], env: dict[str, str], limit: float | None) -> tuple[int, str]:
    """The exit status of a command, `TOO_LONG` where it was ended, and all that it wrote. None of
    its processes is left.
    """
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**env, MARK: mark},
        start_new_session=True,
    )
    over = threading.Event()

    def end() -> None:
        over.set()
        end_marked(mark, process.pid)

    timer = threading.Timer(limit or 1e6, end)
    timer.daemon = True
    timer.start()
    try:
        text, _ = process.communicate()
    finally:
        timer.cancel()
        end_marked(mark, process.pid)
    return (TOO_LONG if over.is_set() else process.returncode), text


def planned(name: str, at: Setting, gpus: int, home: Path, kind: str) -> dict[str, Any]:
    """One setting, planned for `kind` of GPU without running it: its keys hold."""
    given = keys_of(name, at, gpus, 3, home, weights=False)
    words = [f"{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "longfactory.cli", "plan", *words]
    command += ["--gpus", f"{gpus}x{kind}", "--host-gib", "128"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"name": name, "gpus": gpus, "rc": done.returncode, "text": done.stdout + done.stderr}


WRITING = threading.Lock()


def again(row: dict[str, Any], home: Path) -> dict[str, float] | None:
    """GiB and seconds that the code of now gives a row's settings; None where it does not find
    them among those that it says fit.
    """
    from longfactory.config import load_config
    from longfactory.memory.budget import budget, fits
    from longfactory.memory.choose import choose_memory
    from longfactory.memory.report import describe
    from longfactory.memory.search import HOST_SHARE, candidates
    from longfactory.memory.shapes import machine
    from longfactory.model import load
    from longfactory.train.memory_plan import choose_sharding, count_parameters, plan_run

    name, gpus = row["name"], row["gpus"]
    keys = keys_of(name, SETTINGS[name], gpus, 3, home, weights=False)
    cfg = load_config([*(f"{key}={value}" for key, value in keys.items()), "--dry_run"])
    config = load.load_config(cfg.model, cfg.cutoff_len)
    counts = count_parameters(cfg, config)
    where = machine(row["machine"], gpus, HOST, gpu_bytes=GPU, cores=CORES)
    sharding = choose_sharding(cfg, counts.total, gpus, True, where.gpu_bytes)
    job = plan_run(cfg, config, counts, cfg.longest_row, sharding, where).plan.job
    if job.master != (2 if row["split"] else 4):
        split = job.shape.trainable == job.shape.parameters and sharding in ("none", "fsdp2")
        leavable = row["split"] or not split
        job = dataclasses.replace(job, master=2 if row["split"] else 4, leavable=leavable)
    found = choose_memory(job, {}, "auto")
    best = found.budget if describe(found.settings) == row["settings"] else None
    if best is None:
        same = (each for each in candidates(job, "auto") if describe(each) == row["settings"])
        taken = [budget(job, each) for each in same]
        fitting = [each for each in taken if fits(job, each, HOST_SHARE)]
        best = min(fitting, key=lambda each: each.seconds, default=None)
    if best is None:
        return None
    gib = (best.gpu_total - best.gpu.get("runtime", 0.0)) / 2**30
    return {"predicted_gib": gib, "predicted_seconds": best.seconds}


# Of the machines whose rows are in the table: memory of host and GPU, as they report it; cores.
HOST, GPU, CORES = 256 * 2**30, 139.8 * 2**30, 64


def planned_again(rows: list[dict[str, Any]]) -> str:
    """The table with what the code of now predicts for the settings that ran."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            if "error" in row or row["name"] not in SETTINGS:
                continue
            now = again(row, Path(folder))
            none = {"error": "the plan does not have these settings now"}
            found.append({**row, **(none if now is None else now)})
    return table(found)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | GPUs | predicted GiB | peak GiB | off | predicted s | step s | off |"
        " settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['name']} | {r['gpus']} | failed: {r['error']} | | | | | | |")
            continue
        memory, time_off = (
            r[f"predicted_{what}"] / r[got] - 1
            for what, got in (("gib", "peak_gib"), ("seconds", "step_seconds"))
        )
        lines.append(
            f"| {r['name']} | {r['gpus']} | {r['predicted_gib']:.1f} | {r['peak_gib']:.1f} |"
            f" {memory:+.0%} | {r['predicted_seconds']:.2f} | {r['step_seconds']:.2f} |"
            f" {time_off:+.0%} | {r['settings']} |"
        )
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The results, and the same as a table; what else the file has, its `notes` among it, stays,
    and the notes stand below the table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**old, "rows": rows}, indent=1) + "\n")
    made = dict.fromkeys(
        f"`{r['command']}` ({r['date']}, {r['machine']}, {r['versions']})" for r in rows
    )
    text = ["# The plan and the run", table(rows).strip(), "\n".join(made), *old.get("notes", [])]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2))
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=None)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=500, help="no setting begins later")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--calibrate", action="store_true", help="plan with rates measured first")
    parser.add_argument("--check", action="store_true", help="plan every setting, run none")
    parser.add_argument("--kind", default="H100", help="of GPU, for --check")
    parser.add_argument(
        "--again", type=Path, metavar="JSON", help="what the code of now predicts for its rows"
    )
    args = parser.parse_args()
    if args.again is not None:
        print(planned_again(json.loads(args.again.read_text())["rows"]))
        return 0
    names = args.only or [name for name, at in SETTINGS.items() if args.gpus in at.gpus]
    end = time.time() + args.limit
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            every = [
                planned(name, SETTINGS[name], args.gpus, Path(folder), args.kind) for name in names
            ]
        for each in every:
            print(f"== {each['name']}, {each['gpus']} GPUs: exit {each['rc']}\n{each['text']}")
        return int(any(each["rc"] for each in every))
    import torch
    import transformers

    about: dict[str, Any] = {
        "machine": f"{args.gpus} x {machine_name()}",
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    rows: list[dict[str, Any]] = []
    path = None if args.out is None else args.out / "plan_accuracy.json"
    if path is not None and path.is_file():
        rows = json.loads(path.read_text())["rows"]
    free: queue.Queue[str] = queue.Queue()
    groups = max(1, torch.cuda.device_count() // args.gpus)
    for group in range(groups):
        devices = range(group * args.gpus, (group + 1) * args.gpus)
        free.put(of_visible(devices))

    def one(name: str) -> dict[str, Any] | None:
        devices = free.get()
        try:
            if time.time() > end:
                return None
            at = SETTINGS[name]
            steps = min(args.steps, 3) if at.tokens > 32768 else args.steps
            return {**run(name, at, args.gpus, steps, home, devices), **about}
        finally:
            free.put(devices)

    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(groups) as pool,
    ):
        home = Path(folder)
        if args.calibrate:
            file = home / "calibration.json"
            words = [sys.executable, "-m", "longfactory.cli", "plan", "--calibrate", str(file)]
            subprocess.run(words, cwd=ROOT, check=True)
            os.environ["LONGFACTORY_CALIBRATION"] = str(file)
            about["rates"] = json.loads(file.read_text())
        for name, row in zip(names, pool.map(one, names), strict=True):
            if row is None:
                print(f"{name}: not started, the time of this command is up", flush=True)
                continue
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if (r["name"], r["gpus"]) != (name, args.gpus)] + [row]
            if path is not None:
                write(path, rows)
    print(table(rows))
    return int(any("error" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
