"""Shapes of models and jobs whose bytes and seconds are counted."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig

from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob, machine
from qwen_7b import qwen_7b

GiB = 2**30
SHAPE = ModelShape.of(qwen_7b())
TWO = TrainingJob(SHAPE, machine("H200", 2, 256 * GiB), 131072, sp=2)
SHAPE_14B = ModelShape.of(
    qwen_7b(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
    )
)
ONE = TrainingJob(SHAPE, machine("H100", 1, 128 * GiB), 262144, sp=1, sharded=False, master=2)
SMALL_7B = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
MIXTURE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
SHAPES = {
    "7B": qwen_7b(),
    "1.5B": qwen_7b(**SMALL_7B, num_key_value_heads=2, tie_word_embeddings=True),
    "generic layer": AutoConfig.for_model("phi3", num_hidden_layers=32),
    "mixture": AutoConfig.for_model("qwen3_moe", **MIXTURE),
}


def saved(**keys: Any) -> MemorySettings:
    """Every layer recomputed but for its attention, whose output is saved."""
    return MemorySettings(keep_attention=1.0, **keys)


def jobs_of(name: str, gpus: int, tokens: int = 8192) -> dict[str, TrainingJob]:
    """Ways of training a shape, on H100s with 200 GiB of host memory each."""
    config, where = SHAPES[name], machine("H100", gpus, gpus * 200 * GiB)
    full = TrainingJob(ModelShape.of(config), where, tokens, sp=gpus, sharded=gpus > 1)
    few = full.shape.parameters // 150
    lora = ModelShape.of(config, lora=True, trainable=few)
    reached = lora.linear_parameters + (lora.routed_parameters if gpus == 1 else 0)
    four = ModelShape.of(config, lora=True, trainable=few, quantized=reached, quantized_bytes=0.52)
    four = dataclasses.replace(four, written_layer=four.written_layer and gpus == 1)
    return {
        "full": dataclasses.replace(full, leavable=True),
        "split": dataclasses.replace(full, master=2, leavable=True),
        "lora": dataclasses.replace(full, shape=lora),
        "qlora": dataclasses.replace(full, shape=four),
    }
