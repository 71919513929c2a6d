"""The start-up guard on GPUs: families with heads as wide as real ones pass in every precision,
planted faults do not.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import _planted
from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.guard import guard
from longfactory.testing import run_ranks
from longfactory_dev.tiny_models import tiny_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # a first call compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "qwen3_moe",
    "deepseek_v3",
    "llama4_text",
    "qwen3_next",
)
HEADS: dict[str, Any] = {
    "hidden_size": 512,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# What models of the family have where it is not 128, and windows that the guard exceeds or has to
# lower.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {"head_dim": 256, "sliding_window": 512},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128},
    "mistral": {"sliding_window": 4096},
    "deepseek_v3": {
        "head_dim": 64,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "qwen3_next": {"head_dim": 256},
}
PRECISIONS = ("bf16", "autocast", "fp16", "fp32")


def prepared(
    precision: str,
    family: str,
    ctx: sp.SequenceParallel,
    settings: MemorySettings | None = None,
    **fields: Any,
) -> Any:
    """A small model on this rank's GPU, with the engine and the layers of a run."""
    known = tiny_config(family).to_dict()
    latent = known.get("kv_lora_rank")
    wide = {**({} if latent else HEADS), **OTHERS.get(family, {}), **fields}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    model = tiny_model(family, dtype, **{k: v for k, v in wide.items() if k in known}).cuda()
    if precision == "autocast":  # as accelerate does
        model.forward = torch.autocast("cuda", dtype=torch.bfloat16)(model.forward)
    ctx.heads = ctx.kv_heads = None
    hf.prepare(model, ctx)
    apply_memory(model, settings or MemorySettings(), "cuda")
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guard_accepts(precision: str, family: str) -> None:
    ctx = sp.SequenceParallel.create(1, device_type="cuda")
    model = prepared(precision, family, ctx)
    started = time.perf_counter()
    guard(model, ctx)
    print(f"{family} {precision}: {time.perf_counter() - started:.1f} s")


def test_guard_accepts_offload_and_segments() -> None:
    ctx = sp.SequenceParallel.create(1, device_type="cuda")
    for settings in (
        MemorySettings(offload="inputs+attention", pool_bytes=1 << 28, keep_attention=1.0),
        MemorySettings(
            offload="inputs",
            pool_bytes=1 << 28,
            segment_layers=2,
            mlp_chunk=100,
            attention_groups=2,
        ),
    ):
        for family in ("qwen3", "gpt_oss"):
            guard(prepared("bf16", family, ctx, settings), ctx)


@pytest.mark.parametrize("fault", _planted.FAULTS)
def test_guard_refuses_planted(fault: str) -> None:
    ctx = sp.SequenceParallel.create(1, device_type="cuda")
    plant, families, fields = _planted.FAULTS[fault]
    for family in families:
        model = prepared("bf16", family, ctx, **fields)
        with plant(model), pytest.raises(ValueError, match="cannot be trained here"):
            guard(model, ctx)


def accepted_on_two(mode: str) -> list[str]:
    """Refusals, of healthy models."""
    ctx = sp.SequenceParallel.create(2, mode=mode, device_type="cuda")
    refused = []
    for family in FAMILIES:
        for precision in ("bf16", "autocast"):
            try:
                guard(prepared(precision, family, ctx), ctx)
            except ValueError as error:
                refused.append(f"{family} {precision}: {error}")
    return refused


def planted_on_two(mode: str) -> list[str]:
    """Planted faults that were not refused."""
    ctx = sp.SequenceParallel.create(2, mode=mode, device_type="cuda")
    accepted = []
    for fault, (plant, families, fields) in _planted.SPLIT.items():
        for family in families:
            model = prepared("bf16", family, ctx, **fields)
            with plant(model):
                try:
                    guard(model, ctx)
                    accepted.append(f"{fault}: {family}")
                except ValueError:
                    pass
    return accepted


@two_gpus
@pytest.mark.parametrize("mode", ["auto", "zigzag-ring", "ulysses", "llama3"])
def test_guard_on_two_gpus(mode: str) -> None:
    assert run_ranks(2, accepted_on_two, mode, timeout=500, process_group="nccl") == [[], []]
    assert run_ranks(2, planted_on_two, mode, timeout=300, process_group="nccl") == [[], []]
