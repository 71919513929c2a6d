"""Measurements beside `models.py`, in a process of their own with jobs as JSON, one after another:
transformers alone (rows `hf` and `hf-stored`), Unsloth, and what one GPU reaches at the shapes of a
model (`rates`).

hf         transformers' layers and loss, sdpa, gradient checkpointing; Liger's kernels where they
           are installed and know the family. Full training: fp32 weights under autocast in bf16 and
           fused AdamW. LoRA: PEFT on every linear map of a bf16 model.
hf-stored  the same without checkpointing.
unsloth    LoRA by Unsloth, where it can be imported: its FastLanguageModel with its own checkpointing on
           random weights that are written first; the same steps as `hf`.
rates      seconds of a step's products at the shapes of every linear map, of its grouped products at
           the experts' shapes, of the output layer, and of attention with the heads and the mask of
           every kind of layer; bytes a second of copies.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SECONDS = 0.08  # that each rate is measured for, at least
MOST_ROWS = 16384  # of a product: its rate is the same above
LORA_RANK = 8
ROW_FACTS = ("row", "kernel", "tokens", "gpus", "name")


def say(job: dict[str, Any], **facts: Any) -> None:
    about = {"kernel": "auto", "gpus": 1, **{k: job[k] for k in ROW_FACTS if k in job}}
    print("RESULT " + json.dumps({**about, "tokens": job["tokens"][0], **facts}), flush=True)


def note(job: dict[str, Any], text: str) -> None:
    """Says how far a measurement is: one that is cut off then shows where."""
    print(f"NOTE {job.get('name', '')}, {job['row']}: {text}", flush=True)


def make_config(folder: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    return config


# ---- transformers alone --------------------------------------------------------------------------


def transformers_alone(job: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, lora = make_config(job["model"]), job["lora"]
    torch.manual_seed(0)
    begun = time.perf_counter()
    with device:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if lora else torch.float32,
            attn_implementation=job["kernel"],
        )
    liger = use_liger(model)
    if lora:
        model = with_adapters(model)
    model.train()
    if job["row"] == "hf":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    liger_version = ["liger-kernel"] if liger else []
    note(job, f"model after {now(device) - begun:.1f} s")
    train(job, model, config, device, {"liger": liger}, liger_version)


def train(
    job: dict[str, Any],
    model: Any,
    config: Any,
    device: torch.device,
    facts: dict[str, Any],
    packages: list[str],
) -> None:
    """Some steps on one row of random tokens, and what they took."""
    tokens = job["tokens"][0]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(1000, config.vocab_size), (1, tokens), generator=generator)
    ids = ids.to(device)
    seconds, loss = [], torch.zeros(())
    for _ in range(job["steps"]):
        start = now(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(now(device) - start)
        note(job, f"step {len(seconds)}, {seconds[-1]:.2f} s")
    say(
        job,
        seconds=sum(seconds[1:]) / len(seconds[1:]),
        peak=torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        loss=float(loss.detach()),
        versions=versions("torch", "transformers", *packages),
        **facts,
    )


def unsloth(jobs: list[dict[str, Any]]) -> None:
    """Rows of one model. Unsloth wants to be imported before transformers, and a folder with
    weights.
    """
    try:
        from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip

        from plan_accuracy import write_weights

        model_folder = Path(jobs[0]["model"])
        folder = write_weights(model_folder, Path(f"{model_folder}-weights"))
        longest = max(job["tokens"][0] for job in jobs)
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=longest,
            dtype=torch.bfloat16,
            load_in_4bit=False,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            lora_dropout=0,
            bias="none",
            target_modules=[f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")],
            use_gradient_checkpointing="unsloth",
            max_seq_length=longest,
        )
        model.train()
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        for job in jobs:
            say(job, error=f"{type(error).__name__}: {lines[0][:200]}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config(jobs[0]["model"])
    for job in jobs:
        one(job, lambda job: train(job, model, config, device, {}, ["unsloth"]))


def use_liger(model: Any) -> bool:
    """Liger's kernels and its loss, where it is installed and knows the family."""
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError:
        return False
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model=model)
    return True


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    from longfactory.model.experts import expert_maps
    from longfactory.sp.text_model import idle

    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules="all-linear",
        target_parameters=expert_maps(model, idle(model)) or None,
    )
    return get_peft_model(model, config)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


# ---- rates ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Experts:
    """Grouped products of one layer: of `count` experts, `used` a token; (in, out) of each map."""

    count: int
    used: int
    maps: tuple[tuple[int, int], ...]


@dataclasses.dataclass
class Shapes:
    """What the layers of a model multiply, each shape with how often it is there."""

    linear: collections.Counter[tuple[int, int]]
    mlp: collections.Counter[tuple[int, int]]
    """Those of `linear` that are parts of MLPs: routers and shared experts too."""
    norms_after: bool
    experts: collections.Counter[Experts]
    attention: collections.Counter[tuple[int, int, int, int, int]]
    """(heads, key heads, head dim, value dim, keys that a query sees at most or 0)"""
    head: tuple[int, int]
    layer_parameters: int
    head_parameters: int
    """Embedding and output layer."""


def shapes_of(config: Any) -> Shapes:
    from transformers import AutoModelForCausalLM

    from longfactory.memory.layer_kinds import kinds_of, used_experts
    from longfactory.sp.text_model import decoder_layers

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear: collections.Counter[tuple[int, int]] = collections.Counter()
    mlp: collections.Counter[tuple[int, int]] = collections.Counter()
    experts: collections.Counter[Experts] = collections.Counter()
    _, layers = decoder_layers(model)
    used = used_experts(config.get_text_config())
    parameters = 0
    for layer in layers:
        parameters += sum(p.numel() for p in layer.parameters())
        for name, module in layer.named_modules():
            own = [p for _, p in module.named_parameters(recurse=False)]
            convolves = isinstance(module, torch.nn.Conv1d)
            stacked = [p for p in own if p.dim() == 3 and not convolves]
            if stacked:
                flipped = bool(getattr(module, "is_transposed", False))
                maps = [p.shape[1:] if flipped else p.shape[1:][::-1] for p in stacked]
                experts[Experts(len(stacked[0]), used, tuple((m[0], m[1]) for m in maps))] += 1
            for p in own:
                if p.dim() == 2 and not stacked:
                    linear[p.shape[1], p.shape[0]] += 1
                    if name.startswith(("mlp", "feed_forward", "block_sparse_moe")):
                        mlp[p.shape[1], p.shape[0]] += 1
    kinds = kinds_of(model, config)
    attention = collections.Counter(
        (k.heads, k.kv_heads, k.head_dim, k.value_dim, k.reach) for k in kinds
    )
    after = any(k.norms_after for k in kinds)
    head = model.get_output_embeddings().weight.shape
    total = sum(p.numel() for p in model.parameters())  # tied weights count once
    outside = total - parameters
    return Shapes(linear, mlp, after, experts, attention, (head[1], head[0]), parameters, outside)


def measure_rates(job: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes_of(make_config(job["model"]))
    tokens = job["tokens"][0]
    rows = min(tokens, MOST_ROWS)
    scale = tokens / rows
    found: dict[str, Any] = {}
    linear: collections.Counter[str] = collections.Counter()
    mlp = 0.0
    adapters: collections.Counter[str] = collections.Counter()
    flop = 0.0
    for (given, got), times in shapes.linear.items():
        seconds = products(rows, given, got, device)
        linear.update({k: times * scale * v for k, v in seconds.items()})
        mlp += shapes.mlp[given, got] * scale * seconds["forward"]
        flop += times * 2.0 * tokens * given * got
        if job["lora"]:
            for pair in ((given, LORA_RANK), (LORA_RANK, got)):
                seconds = products(rows, *pair, device)
                adapters.update({k: times * scale * v for k, v in seconds.items()})
    found["linear"], found["linear_flop"] = dict(linear), flop
    found["mlp_forward"], found["norms_after"] = mlp, shapes.norms_after
    grouped: collections.Counter[str] = collections.Counter()
    flop = 0.0
    for layer, times in shapes.experts.items():
        for given, got in layer.maps:
            seconds = grouped_products(rows, layer, given, got, device)
            grouped.update({k: times * scale * v for k, v in seconds.items()})
            flop += times * 2.0 * tokens * layer.used * given * got
            if job["lora"]:
                for pair in ((given, LORA_RANK), (LORA_RANK, got)):
                    seconds = grouped_products(rows, layer, *pair, device)
                    adapters.update({k: times * scale * v for k, v in seconds.items()})
    found["experts"], found["experts_flop"] = dict(grouped), flop
    found["adapters"] = dict(adapters)
    head_rows = min(tokens, 8192)
    seconds = products(head_rows, *shapes.head, device)
    found["head"] = {k: tokens / head_rows * v for k, v in seconds.items()}
    found["bandwidth"] = bandwidth(device)
    found["layer_parameters"] = shapes.layer_parameters
    found["head_parameters"] = shapes.head_parameters
    found["attention"], area = {}, 0.0
    for length in job["lengths"]:
        both: collections.Counter[str] = collections.Counter()
        for kind, times in shapes.attention.items():
            seconds, pairs = attention(length, *kind, device)
            both.update({k: times * v for k, v in seconds.items()})
            if length == tokens:
                area += times * 2.0 * pairs * kind[0] * (kind[2] + kind[3])
        found["attention"][str(length)] = dict(both)
    here = found["attention"][str(tokens)]
    say(
        job,
        **found,
        gemm=found["linear_flop"] / linear["forward"],
        grouped_mm=found["experts_flop"] / grouped["forward"] if grouped else None,
        attention_forward=area / max(here["forward"], 1e-9),
        attention_backward=2.5 * area / max(here["backward"], 1e-9),
        versions=versions("torch"),
    )


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, a mean after two that are not counted."""
    work()
    start = now(device)
    work()
    once = now(device) - start
    repeats = 1 if device.type == "cpu" else max(2, min(50, int(SECONDS / max(once, 1e-6))))
    start = now(device)
    for _ in range(repeats):
        work()
    return (now(device) - start) / repeats


def random(*shape: int, device: torch.device) -> Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(*shape, device=device, dtype=dtype)


def products(rows: int, given: int, got: int, device: torch.device) -> dict[str, float]:
    """Of a linear map: its output, and the gradients of its input and of its weight."""
    x, weight = random(rows, given, device=device), random(got, given, device=device)
    dy = random(rows, got, device=device)
    return {
        "forward": timed(lambda: F.linear(x, weight), device),
        "input": timed(lambda: dy @ weight, device),
        "weight": timed(lambda: dy.t() @ x, device),
    }


def grouped_products(
    rows: int, layer: Experts, given: int, got: int, device: torch.device
) -> dict[str, float]:
    """The same of experts that tokens are sent to at random, sorted by expert."""
    pairs = rows * layer.used
    missing = -given % 8, -got % 8  # rows are multiples of 16 bytes
    x = random(pairs, given + missing[0], device=device)
    weight = random(layer.count, got + missing[1], given + missing[0], device=device)
    weight = weight.transpose(1, 2)
    dy = random(pairs, got + missing[1], device=device)
    expert = torch.randint(0, layer.count, (pairs,), device=device)
    ends = torch.bincount(expert, minlength=layer.count).cumsum(0).to(torch.int32)
    if device.type == "cpu":  # torch's product for CPUs does not take every layout
        return {"forward": timed(lambda: x @ weight[0], device), "input": 0.0, "weight": 0.0}
    return {
        "forward": timed(lambda: F.grouped_mm(x, weight, offs=ends), device),
        "input": timed(lambda: F.grouped_mm(dy, weight.transpose(1, 2), offs=ends), device),
        "weight": timed(lambda: F.grouped_mm(x.t(), dy, offs=ends), device),
    }


def attention(
    length: int, heads: int, kv: int, dim: int, value_dim: int, reach: int, device: torch.device
) -> tuple[dict[str, float], float]:
    """The engine's kernel over one row of `length`: seconds, and the pairs that see each other."""
    from longfactory import sp

    if not heads:
        return {"forward": 0.0, "backward": 0.0}, 0.0
    ctx = sp.SequenceParallel.create(1, device_type=device.type)
    plan = sp.plan(length, None, ctx)
    q, k = random(length, heads, dim, device=device), random(length, kv, dim, device=device)
    v = random(length, kv, value_dim, device=device)
    window = reach if 0 < reach < length else None
    out, lse = sp.attention_forward(q, k, v, plan, window=window)
    pairs = length * (length + 1) / 2 if window is None else window * (length - (window - 1) / 2)
    return {
        "forward": timed(lambda: sp.attention_forward(q, k, v, plan, window=window), device),
        "backward": timed(
            lambda: sp.attention_backward(out, q, k, v, out, lse, plan, window=window), device
        ),
    }, pairs


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**20
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / timed(lambda: y.copy_(x), device)


def main() -> int:
    job = json.loads(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if job["row"] == "unsloth":
        unsloth(job.get("jobs", [job]))
    else:
        for each in job.get("jobs", [job]):
            one(each, {"rates": measure_rates}.get(each["row"], transformers_alone))
    sys.stdout.flush()
    os._exit(0)  # a launcher waits for nothing


def one(job: dict[str, Any], work: Callable[[dict[str, Any]], None]) -> None:
    """One measurement; what it failed with is its result."""
    try:
        work(job)
    except (torch.OutOfMemoryError, MemoryError) as error:
        say(job, error="out of memory", detail=str(error).splitlines()[0][:300])
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        say(job, error=f"{type(error).__name__}: {lines[0][:200]}")
    release_memory()


def release_memory() -> None:
    """What a measurement leaves in its process."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
