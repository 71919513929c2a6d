"""Tiny models of the families that have a hand-written layer, in float64 or float32, and their loss
and gradients on one row, on one process and on several.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.decoder_layer import DecoderLayer
from longfactory.memory.layer.families import FAMILIES
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.layout import Segment
from longfactory.sp.recurrent.layers import mixer_of
from longfactory.sp.text_model import decoder_layers
from longfactory_dev.tiny_models import tiny_model
from memory_models import gradients
from memory_ranks import with_lora

ONE = sp.SequenceParallel.create(1)
LENGTH = 48
PACKED = (Segment(0, 17), Segment(17, 40), Segment(40, LENGTH))
DENSE = (Segment(0, LENGTH),)
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}),
    "gemma4": ("gemma4_text", {}),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "granite": ("granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.2}),
    "granitemoeshared": (
        "granitemoeshared",
        {"residual_multiplier": 0.3, "attention_multiplier": 0.2},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"residual_multiplier": 0.3, "position_embedding_type": "rope"},
    ),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}),
    "aria": ("aria_text", {}),
    "cohere_compass": ("cohere_compass_text", {}),
    "gemma4_unified": ("gemma4_unified_text", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "qwen2_5_omni": ("qwen2_5_omni_thinker", {}),
    "qwen3_omni_moe": ("qwen3_omni_moe_thinker", {}),
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}),
}
MODELS = {name: SPECIAL.get(name, (name, {})) for name in FAMILIES}
MODELS |= {
    "gemma4 with experts": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "granitemoehybrid without experts": (
        "granitemoehybrid",
        {"num_local_experts": 0, "position_embedding_type": None},
    ),
}
"""Family -> its model type, and fields of its tiny configuration."""


def stay_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of float64 stay so where transformers makes them float32: a difference of 1e-16
    before a norm is 1e-7 after.
    """

    def patch(place: Any, name: str) -> None:
        own = getattr(place, name)

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.dtype == torch.float64:
                if name == "float" or torch.float32 in args:
                    return x
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            return own(x, *args, **kwargs)

        monkeypatch.setattr(place, name, call)

    for name in ("float", "to", "type", "softmax", "sum"):
        patch(Tensor, name)
    patch(torch.nn.functional, "softmax")
    product = Tensor.__matmul__

    def of_one_type(x: Tensor, y: Tensor) -> Tensor:
        """Rotary angles of older versions of transformers: frequencies by positions."""
        kind = torch.promote_types(x.dtype, y.dtype)
        return product(x.to(kind), y.to(kind))

    monkeypatch.setattr(Tensor, "__matmul__", of_one_type)


def make(
    name: str,
    dtype: torch.dtype = torch.float64,
    lora: bool = False,
    dora: bool = False,
    ctx: sp.SequenceParallel = ONE,
) -> nn.Module:
    kind, fields = MODELS[name]
    model = tiny_model(kind, dtype, **fields)
    hf.prepare(model, ctx)
    if lora:
        targets = r".*layers\.\d+\.(self_attn|mlp|mlp\.shared_experts?)\.\w+_proj(_with_mqa)?"
        if dora and any(name.endswith("experts") for name, _ in model.named_modules()):
            # in some of these families PEFT takes names of the MLP's maps for those of experts
            targets = r".*layers\.\d+\.self_attn\.(?!gate_proj)\w+_proj(_with_mqa)?"
        model = with_lora(model, targets, use_dora=dora).to(dtype)
    return model.train()


def run(model: nn.Module, segments: Any, rounds: int = 1, ctx: sp.SequenceParallel = ONE) -> float:
    """Adds the gradients of a loss with another weight for each token, of several rows. Returns
    this process' part of the loss.
    """
    total = 0.0
    length = segments[-1].stop
    for number in range(rounds):
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 200, (length,), generator=draw)
        positions = torch.cat([torch.arange(s.stop - s.start) for s in segments])
        plan = sp.plan(length, segments, ctx)
        given = hf.inputs({"input_ids": ids, "position_ids": positions}, plan)
        logits = model(**given).logits[0]
        weight = torch.randn(length, logits.shape[-1], generator=draw, dtype=torch.float64)
        weight = sp.shard(weight.to(logits.dtype), plan)
        loss = (torch.log_softmax(logits, -1) * weight).sum() / length
        loss.backward()
        total += float(loss.detach())
    return total


def full_attention(model: nn.Module) -> list[int]:
    """The layers that are not of a linear recurrence."""
    layers = decoder_layers(model)[1]
    return [
        i
        for i, layer in enumerate(layers)
        if getattr(layer, "self_attn", None) is not None and mixer_of(layer) is None
    ]


Case = tuple[str, bool, int, str]
"""A family; whether the row is packed; rows whose gradients are added up; "full", "lora", "dora"."""


def model_of(case: Case, ctx: sp.SequenceParallel = ONE) -> nn.Module:
    return make(case[0], lora=case[3] != "full", dora=case[3] == "dora", ctx=ctx)


def on_ranks(
    cases: list[Case], settings: MemorySettings
) -> list[tuple[float, dict[str, Tensor], str | None]]:
    """Of each case the row's loss and gradients by hand-written layers, from all ranks as one
    sequence-parallel group; and what of it did not run so.
    """
    ctx = sp.SequenceParallel.create(dist.get_world_size())
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_wide(monkeypatch)
        for case in cases:
            model = model_of(case, ctx)
            apply_memory(model, settings)
            loss = torch.tensor(
                run(model, PACKED if case[1] else DENSE, case[2], ctx), dtype=torch.float64
            )
            dist.all_reduce(loss)
            grads = gradients(model)
            for g in grads.values():
                dist.all_reduce(g)
            found.append((float(loss), grads, _not_written(model)))
    return found


def _not_written(model: nn.Module) -> str | None:
    layers = decoder_layers(model)[1]
    for place in full_attention(model):
        installed = layers[place].forward
        if not isinstance(installed, DecoderLayer):
            return f"layer {place} has no hand-written function"
        if not installed.chain.proved or not all(installed.chain.proved.values()):
            return f"layer {place} was not proved"
    return None
