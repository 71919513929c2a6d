"""What the guard holds still while it compares: random numbers, windows, kernels of experts, the
precision of products. As it was before, after each block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..context import SequenceParallel

WINDOW = 128
"""Larger windows and chunks are lowered to this for the comparison, so that the longer document
exceeds them.
"""


@contextlib.contextmanager
def no_random_trace(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class _Everything(set[str]):
    def __contains__(self, item: object) -> bool:
        return True


@contextlib.contextmanager
def unsaid(ctx: SequenceParallel) -> Iterator[None]:
    """Inside the block `auto` does not log what it chooses for the guard's rows: the run's first
    row says it of its own.
    """
    said, ctx.said = ctx.said, _Everything()
    try:
        yield
    finally:
        ctx.said = said


@contextlib.contextmanager
def nothing_random(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing in the model is random: no dropout, no jitter of routers."""
    held: list[tuple[dict[str, Any], str, float]] = []
    for module in model.modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in module.__dict__.items():
            if (
                isinstance(value, float)
                and value
                and (name == "p" if dropout else "drop" in name or "jitter" in name)
            ):
                held.append((module.__dict__, name, value))
    try:
        for fields, name, _ in held:
            fields[name] = 0.0
        yield
    finally:
        for fields, name, value in held:
            fields[name] = value


@contextlib.contextmanager
def lowered_windows(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block no sliding window and no attention chunk is longer than WINDOW, and no
    indexer chooses more keys, wherever it is written: in configurations, in attention modules, in
    hand-written layers."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "window", "index_topk")
    owners: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None), module.__dict__.get("forward")):
            if owner is not None and hasattr(owner, "__dict__"):
                owners[id(owner)] = owner.__dict__
    lowered = [
        (fields, name, WINDOW)
        for fields in owners.values()
        for name in names
        if type(fields.get(name)) is int and fields[name] > WINDOW
    ]
    for fields in owners.values():
        blocks = fields.get("topk_blocks")
        if blocks and blocks * fields["block_size"] > WINDOW:  # an indexer that chooses blocks
            fewer = min(blocks, 8)
            lowered += [(fields, "topk_blocks", fewer), (fields, "block_size", WINDOW // fewer)]
    held = [(fields, name, fields[name]) for fields, name, _ in lowered]
    try:
        for fields, name, value in lowered:
            fields[name] = value
        yield
    finally:
        for fields, name, value in held:
            fields[name] = value


@contextlib.contextmanager
def eager_experts(layer: nn.Module) -> Iterator[None]:
    """Inside the block experts are computed one after another: kernels of grouped products take no
    float64.
    """
    held = {
        id(m.config): m.config
        for m in layer.modules()
        if hasattr(getattr(m, "config", None), "_experts_implementation_internal")
    }
    before = [(config, config._experts_implementation_internal) for config in held.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """float32 products of a reference are float32."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
