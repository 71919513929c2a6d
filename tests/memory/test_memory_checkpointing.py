"""Checkpointing, saved attention outputs, offload, segments and chunks give the gradients of a model that
stores everything.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longfactory import sp
from longfactory.errors import ConfigError
from longfactory.memory import chunked
from longfactory.memory.apply import apply_memory
from longfactory.memory.decoder_layer import _Layer
from longfactory.memory.layer.recognise import recognise
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.layout import Segment
from longfactory_dev.tiny_models import tiny_model as tiny_family
from memory_models import SEGMENTS, assert_same_gradients, gradients, make_model, run
from memory_ranks import with_lora

# the package has a function of this name
engine = importlib.import_module("longfactory.sp.attention")

MiB = 2**20
SETTINGS = {
    "full": MemorySettings(),
    "kept": MemorySettings(keep_attention=1.0),
    "half kept": MemorySettings(keep_attention=0.5),
    "offload": MemorySettings(offload="inputs", pool_bytes=64 * MiB, last_layers_on_gpu=0),
    "offload all": MemorySettings(
        keep_attention=1.0, offload="inputs+attention", pool_bytes=64 * MiB
    ),
    "offload full pool": MemorySettings(
        keep_attention=1.0, offload="inputs+attention", pool_bytes=40_000, late_prefetch=True
    ),
    "pieces": MemorySettings(mlp_chunk=7),
    "segments": MemorySettings(segment_layers=2),
    "segments of 3, offload, kept": MemorySettings(
        segment_layers=3,
        keep_attention=1.0,
        offload="inputs+attention",
        pool_bytes=64 * MiB,
        last_layers_on_gpu=0,
        mlp_chunk=16,
    ),
}


def apply(model, settings, layer):

    return apply_memory(model, dataclasses.replace(settings, layer=layer))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "qwen3_moe", "gpt_neox"]
)
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
    layers = written_backwards(monkeypatch)
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


@pytest.mark.parametrize("layer", ["auto", "generic"])
@pytest.mark.parametrize("what", ["lora", "freeze", "last layer alone"])
def test_some_parameters_frozen(what, layer, monkeypatch):
    def make():
        model = make_model("qwen2", monkeypatch)
        if what == "lora":
            return with_lora(model)
        for name, p in model.named_parameters():
            free = any(
                part in name
                for part in (
                    ("layers.3",)
                    if what == "last layer alone"
                    else ("layers.1.mlp.up", "layers.2", "lm_head")
                )
            )
            p.requires_grad_(free)
        return model

    model = make()
    run(model)
    wanted = gradients(model)
    model = make()
    apply(
        model, WRITTEN["segments of 3, offload, kept" if what == "freeze" else "offload all"], layer
    )
    run(model)
    assert_same_gradients(gradients(model), wanted)


def written_backwards(monkeypatch) -> list[int]:
    """Grows by one with each backward of the hand-written layer."""
    layers: list[int] = []
    backward = _Layer.backward
    counted = staticmethod(lambda ctx, dy: layers.append(1) or backward(ctx, dy))
    monkeypatch.setattr(_Layer, "backward", counted)
    return layers


LORA = {
    "all": {"targets": "all-linear", "lora_alpha": 5},
    "rslora": {"targets": "all-linear", "use_rslora": True},
    "attention": {"targets": ["q_proj", "k_proj", "o_proj"]},
    "norms too": {"targets": ["up_proj"], "modules_to_save": ["input_layernorm"]},
    "a bias": {"targets": "all-linear", "bias": "all"},
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "name",
    [
        "groups, recomputed",
        pytest.param("segments of 3, offload, kept", marks=pytest.mark.slow),
        pytest.param("pieces", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("what", LORA)
def test_lora_in_the_written_layer(what, name, kind, monkeypatch):
    changes = {"mlp_bias": True, "attention_bias": True} if kind == "llama" else {}

    def make():
        return with_lora(make_model(kind, monkeypatch, **changes), **LORA[what])

    model = make()
    loss = run(model)
    wanted = gradients(model)
    model = make()
    apply(model, WRITTEN[name], "auto")
    layers = written_backwards(monkeypatch)
    again = run(model)
    assert float((again - loss).abs()) < 1e-12
    assert_same_gradients(gradients(model), wanted)
    assert len(layers) == (0 if what == "norms too" else 4)


class Casts(TorchDispatchMode):
    """Counts copies into another type: of single tensors with a side of 3, the rank, and of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.single = self.lists = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name == "aten._to_copy.default" and 3 in args[0].shape:
            self.single += (kwargs or {}).get("dtype", args[0].dtype) != args[0].dtype
        self.lists += name == "aten._foreach_copy_.default"
        return func(*args, **(kwargs or {}))


def test_a_layer_s_adapters_are_cast_at_once(monkeypatch):
    """fp32 adapters of bf16 layers: one kernel for all in each pass, and one for the gradients of
    each half; of 14 tensors it would be 42.
    """
    model = with_lora(make_model("llama", monkeypatch), "all-linear")
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    apply(model, WRITTEN["kept"], "auto")
    layers = written_backwards(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model)  # compares the layer with its own code
        model.zero_grad()
        with Casts() as casts:
            run(model)
    assert len(layers) == 8
    assert (casts.single, casts.lists) == (0, 4 * 4)
    assert all(p.grad.dtype == p.dtype for n, p in model.named_parameters() if "lora_" in n)


def test_adapters_that_are_off_or_merged_or_two(monkeypatch):
    """A reference's pass, weights with the adapter in them, and an adapter of its own for a second
    use: what PEFT computes.
    """
    from peft import LoraConfig

    def losses(settings):
        model = with_lora(make_model("llama", monkeypatch), "all-linear")
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(5)
        for name, p in model.named_parameters():
            if "second" in name:
                p.data.normal_(std=0.1)
        model = model.double()
        if settings is not None:
            apply(model, settings, "auto")
        found = [run(model)]
        with model.disable_adapter():
            found.append(run_without_gradient(model))
        model.set_adapter("second")
        found.append(run(model))
        model.base_model.set_adapter(["default", "second"])
        found.append(run(model))
        model.set_adapter("default")
        model.merge_adapter()
        found.append(run_without_gradient(model))
        return [float(x) for x in found]

    plain = losses(None)
    layers = written_backwards(monkeypatch)
    assert losses(WRITTEN["kept"]) == pytest.approx(plain, abs=1e-12)
    assert len(layers) == 8, "with one adapter, not with two"
    assert len({round(x, 9) for x in plain}) == 4 and plain[0] == pytest.approx(plain[4])


def run_without_gradient(model):
    with torch.no_grad():
        return run(model, backward=lambda loss: None)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"lora_dropout": 0.1}, "its q_proj has lora_dropout"),
        ({"lora_bias": True}, "its q_proj has lora_bias"),
    ],
)
def test_other_adapters_run_as_peft_wrote_them(keys, reason, monkeypatch):
    model = with_lora(make_model("llama", monkeypatch), **keys)
    assert recognise(model.get_base_model().model.layers[0]) == reason


@pytest.mark.parametrize("layer", ["auto", "generic"])
def test_hidden_states_that_are_also_used_elsewhere(layer, monkeypatch):
    """The gradient of a layer's output then has a second reader: writing over it would be wrong."""

    def grads(model):
        hooks = [
            block.register_forward_pre_hook(lambda m, args: (args[0] + extra, *args[1:]))
            for block in model.model.layers[1:3]
        ]
        extra = torch.full((1, 44, 32), 0.1, dtype=torch.float64, requires_grad=True)
        run(model)
        for hook in hooks:
            hook.remove()
        return gradients(model) | {"extra": extra.grad}

    model = make_model("llama", monkeypatch)
    wanted = grads(model)
    model.zero_grad()
    apply(model, WRITTEN["groups"], layer)
    assert_same_gradients(grads(model), wanted)


def test_second_backward_is_refused(monkeypatch):
    model = make_model("llama", monkeypatch)
    apply(model, WRITTEN["offload all"], "auto")
    ctx = sp.SequenceParallel.create(1)
    plan = sp.plan(8, None, ctx)
    ids = torch.arange(8)
    out = model(**hf.inputs({"input_ids": ids, "position_ids": ids}, plan)).logits.sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.backward()


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_evaluation_is_the_same(kind, monkeypatch):
    model = make_model(kind, monkeypatch).eval()
    ctx = sp.SequenceParallel.create(1)
    plan = sp.plan(44, SEGMENTS, ctx)
    ids = torch.arange(44)
    inputs = hf.inputs({"input_ids": ids, "position_ids": ids}, plan)
    with torch.no_grad():
        wanted = model(**inputs).logits
        apply(model, MemorySettings(mlp_chunk=7), "auto")
        found = model(**inputs).logits
    assert float((found - wanted).abs().max()) < 1e-13
    assert model(**inputs).logits.requires_grad  # evaluation mode with gradients keeps its graph


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_no_worse_than_the_plain_layer(autocast, monkeypatch):
    """Gradients in bf16 against float64, as far off as those of the Hugging Face layer. Autocast
    changes nothing for bf16 weights.
    """

    def errors(settings):
        model = (
            make_model("qwen2", num_hidden_layers=2, hidden_size=64, intermediate_size=160)
            .bfloat16()
            .double()
        )
        run(model, length=128, segments=LONG)
        exact = gradients(model)
        model = model.bfloat16()
        model.zero_grad()
        if settings is not None:
            apply(model, settings, "auto")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run(model, length=128, segments=LONG)
        return {
            n: float((g.double() - exact[n]).norm() / exact[n].norm())
            for n, g in gradients(model).items()
        }

    layers = written_backwards(monkeypatch)
    plain, ours = errors(None), errors(WRITTEN["groups"])
    assert len(layers) == 2
    assert sum(ours.values()) < 1.1 * sum(plain.values())
    assert max(ours[n] / plain[n] for n in plain) < 1.5


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_segments_run_again_under_the_autocast_of_the_forward(kept):
    """fp32 weights under autocast: the same roundings as without segments, to the last bit,
    although backward is not under autocast.
    """

    def backward(loss):
        with torch.autocast("cpu", enabled=False):
            loss.backward()

    def of(segments):
        model = make_model("llama").float()
        apply(model, MemorySettings(keep_attention=kept, segment_layers=segments), "generic")
        with torch.autocast("cpu", torch.bfloat16):
            run(model, backward=backward)
        return gradients(model)

    one, two = of(1), of(2)
    assert all(torch.equal(two[n], g) for n, g in one.items())


LONG = (Segment(0, 128),)


def test_settings_change_between_steps(monkeypatch):
    model = make_model("qwen2", monkeypatch)
    run(model)
    wanted = gradients(model)
    store = apply_memory(model, MemorySettings())
    for settings in (
        WRITTEN["offload all"],
        WRITTEN["groups"],
        WRITTEN["segments"],
        WRITTEN["offload"],
    ):
        store.change(settings)
        model.zero_grad()
        run(model)
        assert_same_gradients(gradients(model), wanted)
    with pytest.raises(ConfigError, match="fixed"):
        store.change(MemorySettings(checkpoint="none"))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("offload all", "auto"),
        ("offload all", "generic"),
        ("segments of 3, offload, kept", "auto"),
        ("pieces", "auto"),
        pytest.param("segments of 3, offload, kept", "generic", marks=pytest.mark.slow),
        pytest.param("pieces", "generic", marks=pytest.mark.slow),
    ],
)
def test_no_activation_is_left_to_the_garbage_collector(name, layer):
    """A tensor in a circle of references stays in memory long after the layer that made it."""
    model = make_model("qwen2")
    apply(model, SETTINGS[name], layer)
    run(model)
    model.zero_grad()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run(model)
        gc.collect()
        left = [
            tuple(x.shape)
            for x in gc.garbage
            if isinstance(x, torch.Tensor) and x.shape and x.shape[0] in (1, SEGMENTS[-1].stop)
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


def test_a_parameter_that_no_token_uses_has_a_gradient_of_zeros() -> None:
    """An expert that no token chose: under DDP a missing gradient would leave those of other
    parameters unsummed.
    """
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    x = torch.randn(1, 8, 3)
    chunked.run_in_chunks(lambda piece: piece * used, x, lambda: [used, unused], 4).sum().backward()
    torch.testing.assert_close(used.grad, x.sum((0, 1)))
    assert unused.grad is not None and not unused.grad.any()


def test_several_sequences_are_computed_whole() -> None:
    """Generation before anything was trained: a chunk of two sequences lies apart, and experts call
    `view`.
    """
    model = tiny_family("qwen3_moe", torch.float32)
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        apply_memory(model, MemorySettings(mlp_chunk=4))
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_the_last_norm_runs_in_short_chunks(monkeypatch):
    """Of layers that work on all tokens at once too."""
    monkeypatch.setattr(importlib.import_module("longfactory.memory.apply"), "_NORM_TOKENS", 16)
    model = make_model("qwen3", monkeypatch)
    loss = run(model)
    wanted = gradients(model)
    model.zero_grad()
    apply(model, MemorySettings(), "auto")
    norm, lengths = model.model.norm, []
    own = norm.forward.forward
    norm.forward.forward = lambda x: (lengths.append(x.shape[-2]), own(x))[1]
    again = run(model)
    assert float((again - loss).abs()) < 1e-12
    assert_same_gradients(gradients(model), wanted)
    assert max(lengths) == 16 < sum(lengths) / 2
