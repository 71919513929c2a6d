"""One decoder layer of each hand-written family at its real size: the hand-written function against
the layer's own code, recomputed in chunks as it trains where it is not hand-written.

    python benchmarks/layers.py --out benchmarks/results           # all GPUs of the host, 3 min on two
    python benchmarks/layers.py --smoke --out results         # CPU, tiny shapes: does it run?

A row is a layer in bf16 on one document of 32,768 tokens, attention outputs saved, in chunks of
8,192 tokens, or, with experts, all tokens at once (each chunk adds to the gradients of all
experts): seconds of forward and backward (median of five, both ways by turns), their ratio, the
peak of memory. Experts run as they train, both ways (`model/experts.py`). `errors`: of the input's
gradient and of each weight's in bf16, on one chunk's tokens or on all 32,768 where there are no
chunks (what was compiled for the times serves them too), from the layer's own code in fp32 with the
same experts chosen, those of the hand-written function over those of the layer's own code: median
and largest. Each GPU has a process, which takes its share of the rows one after the other, and
another one for those behind a row that kills it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import json
import os
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

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from longfactory.plan.sizes import SIZES

TOKENS, CHUNK, ROUNDS = 32_768, 8_192, 5
MARK = "ROW "


def _heads(heads: int, kv_heads: int, dim: int = 128) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}


def _widths(hidden: int, intermediate: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": intermediate}


def _experts(experts: int, picks: int, width: int) -> dict[str, int]:
    return {
        "num_experts": experts,
        "num_local_experts": experts,
        "n_routed_experts": experts,
        "num_experts_per_tok": picks,
        "moe_intermediate_size": width,
    }


def _of_plan(name: str) -> dict[str, Any]:
    """A layer of a model whose sizes the plan knows."""
    of_the_model = (
        "model_type",
        "architectures",
        "num_hidden_layers",
        "vocab_size",
        "sliding_window_pattern",
    )
    return {k: v for k, v in SIZES[name][1].items() if k not in of_the_model}


_FULL = {"layer_types": ["full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention"]}
_GEMMA3 = _of_plan("gemma-3-12b")
_GPT_OSS = _of_plan("gpt-oss-20b")
_QWEN3_MOE = _of_plan("qwen3-30b-a3b")
_QWEN_7B = _of_plan("7b")
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
_V2_LITE = {
    **_widths(2048, 10944),
    **_LATENT,
    **_experts(64, 6, 1408),
    "q_lora_rank": None,
    "n_shared_experts": 2,
}
_GLM_AIR = {
    **_widths(4096, 10944),
    **_heads(96, 8),
    **_experts(128, 8, 1408),
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma-3-12B, window": ("gemma3_text", {**_GEMMA3, **_SLIDING}),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        _QWEN3_MOE,
    ),
    "gpt-oss-20b, window": (
        "gpt_oss",
        {**_GPT_OSS, **_SLIDING},
    ),
    "Gemma-2-9B, full": (
        "gemma2",
        {**_widths(3584, 14336), **_heads(16, 8, 256), **_FULL, "query_pre_attn_scalar": 256},
    ),
    "GLM-4-9B-0414": ("glm4", {**_widths(4096, 13696), **_heads(32, 2)}),
    "Phi-4": ("phi3", {**_widths(5120, 17920), **_heads(40, 10), "sliding_window": None}),
    "OLMo-2-13B": ("olmo2", {**_widths(5120, 13824), **_heads(40, 40)}),
    "Command-R7B, window": (
        "cohere2",
        {**_widths(4096, 14336), **_heads(32, 8), **_SLIDING, "sliding_window": 4096},
    ),
    "Granite-3.3-8B": (
        "granite",
        {**_widths(4096, 12800), **_heads(32, 8), "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.0078125},
    ),
    "Seed-OSS-36B": (
        "seed_oss",
        {**_widths(5120, 27648), **_heads(80, 8), "residual_dropout": 0.0}
        | {"attention_dropout": 0.0},
    ),
    "GLM-4.5-Air": ("glm4_moe", _GLM_AIR),
    "GLM-4.5-Air, experts saved": ("glm4_moe", {**_GLM_AIR, "keep_mlp": 1.0}),
    "DeepSeek-V2-Lite's sizes in V3's code": (
        "deepseek_v3",
        _V2_LITE,
    ),
    "DeepSeek-V2-Lite": ("deepseek_v2", _V2_LITE),
    "DeepSeek-V2-Lite, experts saved": ("deepseek_v2", {**_V2_LITE, "keep_mlp": 1.0}),
    "Gemma-3-12B, full": ("gemma3_text", {**_GEMMA3, **_FULL}),
    "Qwen3-Next-80B-A3B, full": (
        "qwen3_next",
        {**_widths(2048, 5120), **_heads(16, 2, 256), **_experts(512, 10, 512), **_FULL}
        | {"shared_expert_intermediate_size": 512},
    ),
    "Qwen3-30B-A3B, experts saved": (
        "qwen3_moe",
        {**_QWEN3_MOE, "keep_mlp": 1.0},
    ),
    "gpt-oss-20b, window, experts saved": (
        "gpt_oss",
        {**_GPT_OSS, **_SLIDING, "keep_mlp": 1.0},
    ),
    "Qwen2.5-7B": ("qwen2", _QWEN_7B),
    "Qwen2.5-7B, LoRA on all linears": ("qwen2", {**_QWEN_7B, "lora": True}),
    "Qwen2.5-7B, DoRA": ("qwen2", {**_QWEN_7B, "lora": True, "dora": True}),
    "Qwen2.5-7B, gate and up saved": ("qwen2", {**_QWEN_7B, "keep_mlp": 1.0}),
    "Qwen2.5-7B, LoRA, gate and up saved": ("qwen2", {**_QWEN_7B, "lora": True, "keep_mlp": 1.0}),
}
"""Name -> model type, and fields of its configuration."""


# ---- one row, in a process of its own ------------------------------------------------------------


def _model(name: str, device: torch.device, smoke: bool) -> nn.Module:
    """A model of one layer, in float32 where it is tiny, else in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = LAYERS[name]
    fields = dict(fields)
    lora, dora = fields.pop("lora", False), fields.pop("dora", False)
    fields.pop("keep_mlp", None)
    torch.manual_seed(0)
    if smoke:
        from longfactory_dev.tiny_models import tiny_model

        kinds = {k: v * 4 for k, v in fields.items() if k == "layer_types"}
        model = tiny_model(kind, torch.float32, **kinds)
    else:
        config = AutoConfig.for_model(
            kind, **fields, num_hidden_layers=1, vocab_size=1024, use_cache=False
        )
        config.pad_token_id = 0
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():  # sinks, biases and routers are not set by all families
                p.normal_(0.0, 0.02) if p.dim() > 1 else p.add_(0.02 * torch.randn_like(p))
    if lora:
        from peft import LoraConfig, get_peft_model

        keys = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
        model = get_peft_model(model, keys).to(next(model.parameters()).dtype)
    return model.train()


def _call(model: nn.Module, tokens: int, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """The first layer, and with what the model calls it on a row of one document."""
    from longfactory import sp
    from longfactory.sp import hf
    from longfactory.sp.text_model import decoder_layers

    ctx = sp.SequenceParallel.create(1)
    hf.prepare(hf.unwrap(model), ctx)
    layer: Any = decoder_layers(model)[1][0]
    found: list[Any] = []

    class Found(Exception):
        pass

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))
        raise Found

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.randint(0, 200, (tokens,), device=device)
    positions = torch.arange(tokens, device=device)
    plan = sp.plan(tokens, None, ctx)
    with contextlib.suppress(Found):
        model(**hf.inputs({"input_ids": ids, "position_ids": positions}, plan))
    hook.remove()
    args, kwargs = found[0]
    return layer, args, {n: v for n, v in kwargs.items() if n != "hidden_states"}


def _step(layer: Any, x: Tensor, dy: Tensor, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Gradients of one forward and backward."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, *args[1:], **kwargs)
    (y[0] if isinstance(y, tuple) else y).backward(dy)
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    for p in layer.parameters():
        p.grad = None
    assert leaf.grad is not None
    return {"input": leaf.grad, **found}


def _errors(
    model: nn.Module,
    ways: dict[str, Callable[[], None]],
    tokens: int,
    width: int,
    device: torch.device,
) -> dict[str, float]:
    from longfactory.sp import routers
    from longfactory.sp.distance import worst

    layer, args, kwargs = _call(model, tokens, device)
    dtype = next(model.parameters()).dtype
    x, dy = (torch.randn(1, tokens, width, device=device).to(dtype) for _ in range(2))
    ways["own"]()
    with routers.record(layer) as choices:
        layer(x, *args[1:], **kwargs)
    found: dict[str, dict[str, Tensor]] = {}
    with routers.replay(layer, choices):
        for way, choose in ways.items():
            choose()
            found[way] = _step(layer, x, dy, args, kwargs)
        ways["own"]()
        model.float()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        given = {n: _float(v) for n, v in kwargs.items()}
        exact = _step(layer, x.float(), dy.float(), args, given)
        torch.set_float32_matmul_precision(before)
        model.to(dtype)
    ratios = []
    for name, g in exact.items():
        far = {w: float((r[name].float() - g).norm()) for w, r in found.items()}
        ratios.append(far["written"] / max(far["own"], 1e-6 * float(g.norm()), 1e-30))
    return {"errors": statistics.median(ratios), "worst error": worst(ratios)}


def _float(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_float(v) for v in value)
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def has_experts(fields: dict[str, Any]) -> bool:
    """Families name the number of experts differently."""
    return "num_experts_per_tok" in fields


def measure(name: str, smoke: bool) -> dict[str, Any]:
    """One row."""
    from longfactory.memory.apply import apply_memory
    from longfactory.memory.decoder_layer import DecoderLayer
    from longfactory.memory.settings import MemorySettings
    from longfactory.model import experts

    device = torch.device("cpu" if smoke else "cuda")
    tokens = 128 if smoke else TOKENS
    model = _model(name, device, smoke)
    layer, args, kwargs = _call(model, tokens, device)
    experts.install_grouped(model)
    fields = LAYERS[name][1]
    kept = fields.get("keep_mlp", 0.0)
    chunk: int | None = 32 if smoke else CHUNK
    if has_experts(fields):
        chunk = None
    settings = MemorySettings(keep_attention=1.0, keep_mlp=kept, mlp_chunk=chunk)
    apply_memory(model, settings)
    installed: Any = layer.forward
    if not isinstance(installed, DecoderLayer):
        raise RuntimeError("this layer has no hand-written function")
    own = super(DecoderLayer, installed).__call__
    ways: dict[str, Callable[[], None]] = {
        "own": lambda: setattr(layer, "forward", _Plain(own, installed)),
        "written": lambda: setattr(layer, "forward", installed),
    }
    width = model.config.get_text_config().hidden_size
    dtype = next(model.parameters()).dtype
    row: dict[str, Any] = {"name": name, "kind": LAYERS[name][0], "chunk": chunk}
    x, dy = (torch.randn(1, tokens, width, device=device).to(dtype) for _ in range(2))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):  # the first compiles
        for way, choose in ways.items():
            choose()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            _step(layer, x, dy, args, kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize()
                row[f"{way} GiB"] = torch.cuda.max_memory_allocated() / 2**30
            if turn:
                seconds[way].append(time.perf_counter() - start)
    if not all(installed.chain.proved.values()):
        raise RuntimeError("the hand-written function was found to differ")
    for way, each in seconds.items():
        row[f"{way} ms"] = 1000 * statistics.median(each)
    row["speed"] = row["own ms"] / row["written ms"]
    del x, dy
    try:
        return row | _errors(model, ways, chunk or tokens, width, device)
    except Exception as error:  # the times are right all the same
        traceback.print_exc()
        return row | {"no errors": f"{type(error).__name__}: {error}"[:200]}


def _forget() -> None:
    """Of a row's memory, and of what was compiled for it."""
    from longfactory.memory import compiled

    compiled._compiled.clear()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Plain:
    """The layer as it trains without a hand-written function."""

    def __init__(self, call: Any, installed: Any) -> None:
        self.call, self.forward = call, installed.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


# ---- all rows ------------------------------------------------------------------------------------


def _start(
    names: list[str], gpu: int | None, smoke: bool, limit: float, say: Callable[[Any], None]
) -> None:
    """A process for some rows on one GPU; `say` gets each as it comes."""
    command = [sys.executable, "-u", __file__, "--row", *names, *(["--smoke"] if smoke else [])]
    env = dict(os.environ)
    if gpu is not None:
        shown = env.get("CUDA_VISIBLE_DEVICES")
        env["CUDA_VISIBLE_DEVICES"] = shown.split(",")[gpu] if shown else str(gpu)
    left, begun = list(names), time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                say(json.loads(line.removeprefix(MARK)))
                left = left[1:]
        process.wait()
        over = not timer.is_alive()
        timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no output"])[-1][:300]
    if left and not over:
        say({"name": left[0], "error": last})
        rest = limit - (time.monotonic() - begun)
        if left[1:] and rest > 15:
            _start(left[1:], gpu, smoke, rest, say)
            return
        left = left[1:]
    for place, name in enumerate(left):
        why = "not started: time is up" if place or not over else f"not done in {limit:.0f} s"
        say({"name": name, "error": why})


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['name']} | | | | | | | {row['error']} |"
    peaks = [
        f"{row[f'{way} GiB']:.1f}" if f"{way} GiB" in row else "" for way in ("own", "written")
    ]
    chunk = row.get("chunk", CHUNK)
    errors = row.get("no errors") or f"{row['errors']:.2f}, {row['worst error']:.2f}"
    return (
        f"| {row['name']} | {'all' if chunk is None else f'{chunk:,}'} | {row['own ms']:.1f}"
        f" | {row['written ms']:.1f} | {row['speed']:.2f} | {peaks[0]} | {peaks[1]} | {errors} |"
    )


HEAD = (
    "| layer | tokens at once | own code, ms | hand-written, ms | speed | own code, GiB |"
    " hand-written, GiB | errors: median, largest |\n|---|---|---|---|---|---|---|---|"
)


def write(out: Path, rows: list[dict[str, Any]], machine: str) -> None:
    """The results as JSON and as a table. Earlier rows stay, unless they were measured again, and
    so does what is written below the table.
    """
    path = out / "layers.json"
    earlier = json.loads(path.read_text()) if path.is_file() else []
    found = {row["name"]: row for row in earlier}
    for row in rows:
        if "error" not in row or row["name"] not in found:
            found[row["name"]] = row | {"machine": machine}
    ordered = sorted(found.values(), key=lambda row: list(LAYERS).index(row["name"]))
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    machines = "; ".join(sorted({row["machine"] for row in ordered if "machine" in row}))
    about = f"One layer on {machines}; {TOKENS:,} tokens, bf16. Rows without numbers: not measured."
    table = "\n".join([HEAD, *map(_line, ordered)])
    page = out / "layers.md"
    _, _, notes = (page.read_text() if page.is_file() else "").partition("|---|")
    _, _, notes = notes.partition("\n\n")
    page.write_text(
        f"# The hand-written layer beside the generic one\n\n{about}\n\n{table}\n\n{notes}".rstrip()
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(LAYERS), help="names of rows")
    parser.add_argument("--seconds", type=float, default=175.0, help="of the whole command")
    parser.add_argument("--render", type=Path, nargs="*", help="results to merge into --out")
    parser.add_argument("--row", nargs="+", help="for this command's own processes")
    a = parser.parse_args()
    for name in a.row or ():
        try:
            row = measure(name, a.smoke)
        except Exception as error:
            traceback.print_exc()
            row = {"name": name, "error": f"{type(error).__name__}: {error}"[:300]}
        print(MARK + json.dumps(row), flush=True)
        _forget()
    if a.row:
        return
    if a.render is not None:
        for file in a.render:
            for row in json.loads(file.read_text()):
                write(a.out, [row], row.get("machine", "one H200"))
        return
    gpus: list[int | None] = [None] if a.smoke else list(range(torch.cuda.device_count()))
    if not gpus:
        raise SystemExit("No GPU here. --smoke runs tiny shapes on a CPU.")
    rows: list[dict[str, Any]] = []
    print(HEAD, flush=True)

    def say(row: dict[str, Any]) -> None:
        rows.append(row)
        print(_line(row), flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(gpus)) as pool:
        list(
            pool.map(
                lambda i: _start(a.only[i :: len(gpus)], gpus[i], a.smoke, a.seconds, say),
                range(min(len(gpus), len(a.only))),
            )
        )
    device = "CPU" if a.smoke else torch.cuda.get_device_name(0)
    write(a.out, rows, f"one {device}, torch {torch.__version__}")
    raise SystemExit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
