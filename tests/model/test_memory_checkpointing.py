"""Checkpointing, kept attention, offload, segments and pieces give the gradients of a model that stores everything."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
from memory_models import assert_same_gradients, gradients, make_model, run

from longfactory.model.memory.apply import apply_memory
from longfactory.model.memory.decoder_layer import _Layer
from longfactory.model.memory.settings import MemorySettings

engine = importlib.import_module("longfactory.sp.attention")  # the package has a function of this name

MiB = 2**20
SETTINGS = {
    "full": MemorySettings(),
    "kept": MemorySettings(keep_attention=1.0),
    "half kept": MemorySettings(keep_attention=0.5),
    "offload": MemorySettings(offload="inputs", pool_bytes=64 * MiB, last_layers_on_gpu=0),
    "offload all": MemorySettings(keep_attention=1.0, offload="inputs+attention", pool_bytes=64 * MiB),
    "offload full pool": MemorySettings(keep_attention=1.0, offload="inputs+attention", pool_bytes=40_000, late_prefetch=True),
    "pieces": MemorySettings(mlp_chunk=7),
    "segments": MemorySettings(segment_layers=2),
    "segments of 3, offload, kept": MemorySettings(
        segment_layers=3, keep_attention=1.0, offload="inputs+attention", pool_bytes=64 * MiB, last_layers_on_gpu=0, mlp_chunk=16
    ),
}


def apply(model, settings, layer):

    return apply_memory(model, dataclasses.replace(settings, layer=layer))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "qwen3_moe", "gpt_neox"])
def test_gradients_equal_those_without_checkpointing(kind, name, monkeypatch):
    model = make_model(kind, monkeypatch)
    loss = run(model)
    wanted = gradients(model)
    model.zero_grad()
    apply(model, SETTINGS[name], "generic")
    for _ in range(2):  # the second step reuses what the first allocated
        model.zero_grad()
        again = run(model)
        assert float((again - loss).abs()) < 1e-12
        assert_same_gradients(gradients(model), wanted)


WRITTEN = {
    **SETTINGS,
    "groups": MemorySettings(keep_attention=1.0, attention_groups=2, mlp_chunk=9),
    "groups, recomputed": MemorySettings(attention_groups=2),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_written_layer_gives_the_same_gradients(kind, name, monkeypatch):
    changes = {"mlp_bias": True, "attention_bias": True} if kind == "llama" else {}
    model = make_model(kind, monkeypatch, **changes)
    loss = run(model)
    wanted = gradients(model)
    apply(model, WRITTEN[name], "auto")
    layers = []
    monkeypatch.setattr(_Layer, "backward", staticmethod(lambda ctx, dy, backward=_Layer.backward: layers.append(1) or backward(ctx, dy)))
    for _ in range(2):
        model.zero_grad()
        again = run(model)
        assert float((again - loss).abs()) < 1e-12
        assert_same_gradients(gradients(model), wanted)
    assert len(layers) == 8


@pytest.mark.parametrize(("keep", "runs"), [(0.0, 8), (0.5, 6), (1.0, 4)])
def test_kept_attention_runs_its_kernel_once(keep, runs, monkeypatch):
    model = make_model("llama", monkeypatch)
    apply_memory(model, MemorySettings(keep_attention=keep, layer="generic"))
    calls = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda *a: calls.append(1) or forward(*a))
    run(model)
    assert len(calls) == runs


@pytest.mark.parametrize(("kind", "passes"), [("llama", 2), ("gemma2", 3)])
def test_mlp_is_recomputed_once(kind, passes, monkeypatch):
    """One forward, one recompute; a third pass only where a norm stores the MLP's output."""
    model = make_model(kind, monkeypatch)
    apply_memory(model, MemorySettings(mlp_chunk=LENGTH_PIECES, layer="generic"))
    run(model)  # the first call also proves that pieces are allowed
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda m, x, y: seen.append(y.shape[1]))
    run(model)
    assert sum(seen) == passes * 4 * 44


LENGTH_PIECES = 10
