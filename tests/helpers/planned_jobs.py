"""Shapes of models and jobs whose bytes and seconds are counted."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig

from known_sizes import of_size, qwen_7b
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob, machine

GiB = 2**30
SHAPE = ModelShape.of(qwen_7b())
TWO = TrainingJob(SHAPE, machine("H200", 2, 256 * GiB), 131072, sp=2)
SHAPE_14B = ModelShape.of(of_size("14b"))
ONE = TrainingJob(SHAPE, machine("H100", 1, 128 * GiB), 262144, sp=1, sharded=False, master=2)
SHAPES = {
    "7B": qwen_7b(),
    "1.5B": of_size("1.5b"),
    "generic layer": AutoConfig.for_model("phi3", num_hidden_layers=32),
    "mixture": of_size("qwen3-30b-a3b"),
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
