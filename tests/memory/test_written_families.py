"""The hand-written layer of every family that has one: loss and gradients of the family's own code."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longfactory.memory.apply import apply_memory
from longfactory.memory.layer.recognise import recognise
from longfactory.memory.settings import MemorySettings
from longfactory.sp import backends
from longfactory.sp.text_model import decoder_layers
from longfactory.testing import run_ranks
from longfactory_dev.tiny_models import tiny_model
from memory_models import assert_same_gradients, gradients
from written_models import (
    DENSE,
    MODELS,
    PACKED,
    Case,
    full_attention,
    make,
    model_of,
    on_ranks,
    run,
    stay_wide,
)

SETTINGS = {
    "whole": MemorySettings(),
    "saved, chunks": MemorySettings(keep_attention=1.0, mlp_chunk=10),
    "groups": MemorySettings(attention_groups=2, mlp_chunk=16),
    "segments": MemorySettings(segment_layers=3, keep_attention=0.5, mlp_chunk=16),
}
FAST = ("gemma3", "qwen3_moe", "gpt_oss", "phi3", "olmo2", "cohere", "deepseek_v3", "qwen3_5")
"""The others are slow tests."""


def some(names: tuple[str, ...]) -> list[Any]:
    """All families, those but `names` as slow ones."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_wide(monkeypatch)


def written_layers(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by a layer's place with each backward of the hand-written function."""
    from longfactory.memory import decoder_layer

    ran: list[int] = []
    own = decoder_layer.backward

    def backward(x: Any, dy: Any, dx: Any, saved: Any, call: Any, *rest: Any) -> Any:
        ran.append(call.owner.index)
        return own(x, dy, dx, saved, call, *rest)

    monkeypatch.setattr(decoder_layer, "backward", backward)
    return ran


def compare(
    name: str,
    settings: MemorySettings,
    segments: Any,
    monkeypatch: pytest.MonkeyPatch,
    lora: bool = False,
    rounds: int = 1,
    dora: bool = False,
) -> None:
    model = make(name, torch.float64, lora, dora)
    loss = run(model, segments, rounds)
    wanted = gradients(model)
    model.zero_grad()
    apply_memory(model, settings)
    ran = written_layers(model, monkeypatch)
    again = run(model, segments, rounds)
    assert again == pytest.approx(loss, abs=1e-9, rel=1e-9)
    assert_same_gradients(gradients(model), wanted, 1e-9)
    assert sorted(ran) == sorted(full_attention(model) * rounds)


@pytest.mark.parametrize("name", some(FAST))
def test_gradients_are_those_of_the_familys_own_code(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(name, SETTINGS["saved, chunks"], PACKED, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["whole", "groups", "segments"])
@pytest.mark.parametrize("segments", [PACKED, DENSE], ids=["packed", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_with_other_settings(
    name: str, segments: Any, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(name, SETTINGS[settings], segments, monkeypatch, rounds=2)


def test_beside_layers_that_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 E2B and E4B: the last layers use keys of two earlier ones."""
    types = ["sliding_attention", "full_attention"] * 3
    fields = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": types}
    monkeypatch.setitem(MODELS, "gemma4 that shares keys", ("gemma4_text", fields))
    model = make("gemma4 that shares keys")
    loss = run(model, PACKED)
    wanted = gradients(model)
    model.zero_grad()
    apply_memory(model, SETTINGS["segments"])
    ran = written_layers(model, monkeypatch)
    assert run(model, PACKED) == pytest.approx(loss, abs=1e-9, rel=1e-9)
    assert_same_gradients(gradients(model), wanted, 1e-9)
    assert sorted(ran) == [0, 1]


@pytest.mark.parametrize("name", some(("gemma3", "qwen3_moe")))
def test_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are those of the family's own code to 1e-6, or as near as that is to
    float64 (gemma4 and recurrences of tiny models, some 1e-5: two computations in float32 cannot
    be nearer to each other); and no gradient is twice as far from float64 as its own code's.
    """
    model = make(name, torch.float32)
    wide_model = copy.deepcopy(model).double()
    run(wide_model, PACKED)
    exact = gradients(wide_model)
    loss = run(model, PACKED)
    own = gradients(model)
    model.zero_grad()
    apply_memory(model, SETTINGS["groups"])
    ran = written_layers(model, monkeypatch)
    assert run(model, PACKED) == pytest.approx(loss, rel=1e-6)
    found = gradients(model)
    assert sorted(ran) == full_attention(model)

    def far(a: dict[str, Tensor], b: dict[str, Tensor], names: Any) -> float:
        """The relative distance of some gradients, all together."""
        apart = sum(float((a[n].double() - b[n].double()).square().sum()) for n in names)
        return float((apart / sum(float(b[n].double().square().sum()) for n in names)) ** 0.5)

    assert far(found, own, own) <= max(1e-6, 1.5 * far(own, exact, own))
    for n in exact:
        if float(exact[n].abs().max()) > 1e-9:
            # a few numbers' distance is one draw of rounding
            times = 2 if exact[n].numel() > 16 else 4
            assert far(found, exact, [n]) <= times * far(own, exact, [n]) + 5e-7, n


@pytest.mark.parametrize("name", some(("gemma3", "phi3", "deepseek_v3")))
def test_with_adapters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(name, SETTINGS["saved, chunks"], PACKED, monkeypatch, lora=True)


@pytest.mark.parametrize("settings", ["saved, chunks", "groups"])
@pytest.mark.parametrize("name", some(("qwen2", "gemma3", "phi3")))
def test_with_dora(name: str, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Magnitudes have gradients too, with biases (qwen2), norms behind (gemma3), joint maps (phi3)."""
    compare(name, SETTINGS[settings], PACKED, monkeypatch, lora=True, dora=True)
    compare(name, KEPT, PACKED, monkeypatch, lora=True, dora=True)


@pytest.mark.parametrize("name", some(("deepseek_v3", "qwen3_5")))
def test_kernels_that_pad_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of theirs are parts of wider tensors, as FlashAttention's are where keys and values
    have other dims.
    """

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 8))[..., : x.shape[-1]]

    for backend in (backends.cpu, backends.math):
        forward, backward = backend.forward, backend.backward

        def wide_forward(*args: Any, own: Any = forward) -> tuple[Tensor, Tensor]:
            out, lse = own(*args)
            return padded(out), lse

        def wide_backward(*args: Any, own: Any = backward) -> tuple[Tensor, ...]:
            return tuple(padded(g) for g in own(*args))

        monkeypatch.setattr(backend, "forward", wide_forward)
        monkeypatch.setattr(backend, "backward", wide_backward)
    compare(name, SETTINGS["whole"], DENSE, monkeypatch)
    compare(name, SETTINGS["saved, chunks"], DENSE, monkeypatch)


def compare_on_ranks(ranks: int, cases: list[Case], settings: MemorySettings) -> None:
    """Each rank has the loss and the gradients that one process has, by the families' own code."""
    results = run_ranks(ranks, on_ranks, cases, settings, timeout=800)
    for place, case in enumerate(cases):
        model = model_of(case)
        loss = run(model, PACKED if case[1] else DENSE, case[2])
        for found_loss, found, not_written in (rank[place] for rank in results):
            assert not_written is None, f"{case}: {not_written}"
            assert found_loss == pytest.approx(loss, abs=1e-9, rel=1e-9), case
            assert_same_gradients(found, gradients(model), 1e-9)


@pytest.mark.processes
def test_on_four_ranks() -> None:
    """Of a row, and of three rows whose gradients are added up."""
    cases: list[Case] = [
        ("gemma3", False, 3, "full"),
        ("qwen3_moe", True, 1, "lora"),
        ("qwen2", True, 3, "dora"),
    ]
    compare_on_ranks(4, cases, SETTINGS["groups"])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("settings", ["saved, chunks", "segments"])
def test_every_family_on_ranks(settings: str, packed: bool, ranks: int) -> None:
    rounds = 3 if settings == "segments" else 1
    kinds = ("full", "lora") if rounds == 1 else ("lora", "full")
    cases = [(name, packed, rounds, kinds[i % 2]) for i, name in enumerate(MODELS)]
    compare_on_ranks(ranks, cases, SETTINGS[settings])


KEPT = MemorySettings(keep_attention=1.0, keep_mlp=0.5, mlp_chunk=10)
KEPT_ALL = MemorySettings(keep_mlp=1.0, segment_layers=3)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma3", KEPT),
        ("phi3", KEPT),
        ("qwen3_moe", KEPT),
        pytest.param("deepseek_v3", KEPT, marks=pytest.mark.slow),
        pytest.param("gpt_oss", KEPT_ALL, marks=pytest.mark.slow),
        pytest.param("qwen2", KEPT_ALL, marks=pytest.mark.slow),
        pytest.param("phi3", KEPT_ALL, marks=pytest.mark.slow),
        pytest.param("cohere", KEPT_ALL, marks=pytest.mark.slow),
    ],
)
def test_gate_and_up_saved(
    name: str, settings: MemorySettings, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(name, settings, PACKED, monkeypatch, lora)


@pytest.mark.parametrize(
    ("name", "again"),
    [("qwen2", ["gate", "o", "up"]), ("qwen3_moe", ["o"]), ("cohere", ["gate", "up"])],
)
def test_what_is_saved_is_not_computed_again(
    name: str, again: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`again`: what backward computes of a layer whose products are not saved. A parallel layer
    asks for no output projection there.
    """
    from longfactory.memory.layer import mlp_half

    calls: list[str] = []
    own = mlp_half.linear

    def linear(x: Tensor, c: Any, part: str, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(part)
        return own(x, c, part, *args, **kwargs)

    monkeypatch.setattr(mlp_half, "linear", linear)
    for share in (0.0, 0.5, 1.0):
        model = make(name)
        apply_memory(model, MemorySettings(keep_mlp=share))
        run(model, PACKED)  # the first call compares the layer with its own code
        calls.clear()
        run(model, PACKED)
        layers = len(decoder_layers(model)[1])
        found = sorted(part for part in calls if part != "down")
        once = ["o"] if name == "qwen3_moe" else ["gate", "o", "up"]
        assert found == sorted(layers * once + int(layers * (1 - share)) * again)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(MemorySettings(keep_attention=1.0), 4), (SETTINGS["saved, chunks"], 30)],
)
def test_queries_and_keys_before_their_norm_are_made_once_in_backward(
    settings: MemorySettings, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a row is worked on at once; in chunks they would have to be kept for all of them."""
    from longfactory.memory.layer import attention_half

    calls: list[str] = []
    own = attention_half._projected

    def projected(n: Tensor, c: Any, name: str, heads: slice = attention_half.ALL) -> Tensor:
        if name != "v":
            calls.append(name)
        return own(n, c, name, heads)

    model = make("qwen3")
    loss = run(model, PACKED)
    wanted = gradients(model)
    model.zero_grad()
    apply_memory(model, settings)
    monkeypatch.setattr(attention_half, "_projected", projected)
    assert run(model, PACKED) == pytest.approx(loss, abs=1e-9)
    assert_same_gradients(gradients(model), wanted, 1e-9)
    calls.clear()
    run(model, PACKED)
    layers = len(decoder_layers(model)[1])
    assert len(calls) == layers * expected


def test_a_mixture_of_experts_that_is_saved_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first pass with a graph, which is gone when backward is over."""
    from longfactory.memory.decoder_layer import DecoderLayer

    calls: list[bool] = []
    own = DecoderLayer._run_mlp

    def run_mlp(self: DecoderLayer, n: Tensor, start: int) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return own(self, n, start)

    monkeypatch.setattr(DecoderLayer, "_run_mlp", run_mlp)
    no, yes = [False] * 2, [True] * 2
    for share, expected in ((0.0, no + no + yes + yes), (0.5, no + yes + yes), (1.0, yes + yes)):
        model = make("qwen3_moe")
        apply_memory(model, MemorySettings(keep_mlp=share))
        run(model, PACKED)  # the first call compares the layer with its own code
        calls.clear()
        run(model, PACKED)
        assert calls == expected
    calls.clear()
    seen: weakref.WeakSet[Tensor] = weakref.WeakSet()
    for layer in decoder_layers(model)[1]:
        layer.mlp.register_forward_hook(lambda m, args, out: seen.add(out))
    run(model, PACKED)
    gc.collect()
    assert calls and not seen


def test_saving_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    apply_memory(tiny_model("stablelm", torch.float64), MemorySettings(keep_mlp=1.0))
    assert "keep_mlp: 1.0 saves nothing" in caplog.text


@pytest.mark.parametrize("fault", ["scale", "window", "gradient"])
def test_a_layer_that_differs_runs_as_its_own_code(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the recogniser believes of a layer is compared before it is used."""
    from longfactory.memory.layer import mlp_half

    model = make("qwen3")
    loss = run(model, PACKED)
    wanted = gradients(model)
    model.zero_grad()
    apply_memory(model, MemorySettings())
    for layer in decoder_layers(model)[1]:
        if fault == "scale":
            layer.forward.scale *= 1.02
        elif fault == "window":
            layer.forward.window = None
    if fault == "gradient":
        own = mlp_half.gated_backward
        monkeypatch.setattr(
            mlp_half, "gated_backward", lambda *a: (lambda h, g, u: (h, g, 1.1 * u))(*own(*a))
        )
    ran = written_layers(model, monkeypatch)
    assert run(model, PACKED) == pytest.approx(loss, abs=1e-12)
    assert_same_gradients(gradients(model), wanted, 1e-9)
    assert set(ran) <= ({1, 3} if fault == "window" else set())
    assert "run transformers' own code" in caplog.text


def test_a_layer_of_another_version_has_a_reason() -> None:
    """A part that is gone or new, an activation, dropout: one line says which."""
    layer: Any = decoder_layers(make("gemma3"))[1][0]
    del layer.self_attn.scaling
    assert "scaling" in str(recognise(layer))
    layer = decoder_layers(make("qwen3"))[1][0]
    layer.extra = nn.Linear(2, 2)
    assert "other parts than expected" in str(recognise(layer))
    layer = decoder_layers(make("seed_oss"))[1][0]
    layer.mlp.residual_dropout = 0.1
    assert recognise(layer) == "SeedOssDecoderLayer has dropout"
    layer = decoder_layers(make("granite"))[1][0]
    layer.mlp.config.hidden_act = "relu"
    assert recognise(layer) == "its activation is relu"
    reason = recognise(decoder_layers(tiny_model("opt"))[1][0])
    assert reason == "OPTDecoderLayer: its MLP has no gate"
