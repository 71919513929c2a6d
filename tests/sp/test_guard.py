"""The start-up guard: healthy models pass in every precision, planted faults do not, and nothing of
it is left behind.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import _planted
from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory.sp import compare, hf
from longfactory.sp import guard as guard_module
from longfactory.sp.guard import guard
from longfactory.testing import run_ranks
from longfactory_dev import families
from longfactory_dev.tiny_models import tiny_config, tiny_model

ONE = sp.SequenceParallel.create(1)
PRECISIONS = ("bf16", "fp16", "fp32", "autocast")


def prepared(
    precision: str,
    family: str,
    ctx: sp.SequenceParallel = ONE,
    settings: MemorySettings | None = None,
    **fields: Any,
) -> Any:
    """A tiny model with the engine, and with hand-written or recomputed layers, as a run has it."""
    family, _, more = families.VARIANTS.get(family, (family, None, {}))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    model = tiny_model(family, dtype, **{**more, **fields})
    if precision == "autocast":  # as accelerate does
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    ctx.heads = ctx.kv_heads = None
    hf.prepare(model, ctx)
    apply_memory(model, settings or MemorySettings(), "cpu")
    return model


def exact_families() -> list[str]:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    return re.findall(
        r"^\| ([^|]+) \|", page.split("## Exact")[1].split("## Refused")[0], re.MULTILINE
    )[1:]


# Healthy models


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guard_accepts(precision: str, family: str) -> None:
    guard(prepared(precision, family), ONE)


@pytest.mark.parametrize("family", ["ctrl", "diffllama"])
def test_guard_accepts_where_one_sample_of_the_own_error_is_small(family: str) -> None:
    """In fp16 a neuron at the kink of a ReLU, or a scalar's gradient, happens to round worse in the
    run than in the model's own layer.
    """
    guard(prepared("fp16", family), ONE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ctrl", "diffllama", "opt"])
def test_guard_accepts_other_weights(family: str) -> None:
    """Of these models one sample of the own error refuses about every fourth in fp16."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(12):
        model = prepared("fp16", family)
        with torch.no_grad():
            for p in model.parameters():
                if p.float().std() > 0:
                    p.copy_(
                        torch.randn(p.shape, generator=draw) * p.float().std() + p.float().mean()
                    )
        guard(model, ONE)


def test_guard_records_the_experts_of_the_whole_pass() -> None:
    """Where scores tie, the router of a recomputed layer would draw other experts than the recorded
    ones.
    """
    guard(prepared("autocast", "phimoe with longrope", sliding_window=300), ONE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guard_refuses_no_family_that_is_exact(precision: str) -> None:
    """All of docs/models.md, with windows that are exceeded and with windows that have to be
    lowered.
    """
    refused = {}
    for family in exact_families():
        base = families.VARIANTS.get(family, (family, None, {}))[0]
        windowed = "sliding_window" in tiny_config(base).get_text_config().to_dict()
        for fields in ({}, {"sliding_window": 300}) if windowed else ({},):
            try:
                guard(prepared(precision, family, **fields), ONE)
            except ValueError as error:
                if not fails_by_itself(precision, family, **fields):
                    refused[family, *fields] = str(error)
    assert refused == {}


def fails_by_itself(precision: str, family: str, **fields: Any) -> bool:
    """Whether transformers' own model cannot compute in this precision (experts that add bf16 to
    fp32 under autocast).
    """
    family, _, more = families.VARIANTS.get(family, (family, None, {}))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    model = tiny_model(family, dtype, **{**more, **fields})
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            logits = model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits
        logits.float().sum().backward()
    except RuntimeError:
        return True
    return not bool(logits.isfinite().all())


# Planted faults


def planted(
    precision: str,
    fault: str,
    faults: dict[str, Any],
    ctx: sp.SequenceParallel = ONE,
    most: int = 9,
) -> dict[str, str]:
    """What the guard says of each family that shows the fault."""
    plant, names, fields = faults[fault]
    said = {}
    for family in names[:most]:
        model = prepared(precision, family, ctx, **fields)
        with plant(model):
            try:
                guard(model, ctx)
                said[family] = ""
            except ValueError as error:
                # by a comparison, not by a fault that cannot run
                assert "fails with" not in str(error), error
                said[family] = str(error)
    return said


@pytest.mark.parametrize("fault", _planted.FAULTS)
def test_guard_refuses_planted(fault: str) -> None:
    for family, message in planted("bf16", fault, _planted.FAULTS, most=1).items():
        assert message, f"{fault}: accepted for {family}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "autocast"])
def test_guard_refuses_planted_in_every_precision(precision: str) -> None:
    # Under autocast weights and hidden states differ in type and the hand-written layer does not
    # run.
    for fault in (
        f for f in _planted.FAULTS if precision != "autocast" or not f.startswith("hand-written")
    ):
        for family, message in planted(precision, fault, _planted.FAULTS).items():
            assert message, f"{fault}: accepted for {family} in {precision}"


def two_ranks(mode: str, alignment: int) -> sp.SequenceParallel:
    """On GPUs a row is padded to 256 tokens a rank."""
    ctx = sp.SequenceParallel.create(2, mode=mode)
    guard_module.row.alignment = lambda ctx: alignment  # type: ignore[attr-defined]
    return ctx


def planted_on_two(fault: str, mode: str, alignment: int) -> dict[str, str]:
    return planted("bf16", fault, _planted.SPLIT, two_ranks(mode, alignment))


def healthy_on_two(mode: str, alignment: int) -> None:
    ctx = two_ranks(mode, alignment)
    for family in ("llama", "gpt_oss", "qwen3_next"):
        guard(prepared("bf16", family, ctx), ctx)


@pytest.mark.slow
@pytest.mark.parametrize("alignment", [4, 512])
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3"])
def test_guard_refuses_planted_on_two_ranks(mode: str, alignment: int) -> None:
    run_ranks(2, healthy_on_two, mode, alignment)
    for fault in _planted.SPLIT:
        for said in run_ranks(2, planted_on_two, fault, mode, alignment):
            for family, message in said.items():
                assert message, f"{fault}: accepted for {family} with {mode}"


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("mode", ["zigzag-ring", "llama3"])
def test_the_longer_document_is_on_several_ranks(mode: Any, size: int) -> None:
    """A GPU holds 256 tokens of the row at least: documents that fit there are dealt whole, and
    nothing is exchanged.
    """
    ctx = sp.SequenceParallel(size, mode=mode, device_type="cuda")
    shorter, longer = guard_module.row.compared_lengths(ctx)
    row = guard_module.row.Row([torch.ones(shorter).long(), torch.ones(longer).long()], ctx)
    begin, end = row.span.start + shorter, row.span.stop
    intervals = row.plan.layout.intervals
    holders = [any(a < end and b > begin for a, b in of_rank) for of_rank in intervals]
    assert sum(holders) > 1, intervals


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["zigzag-ring", "llama3"])
@pytest.mark.parametrize("counts", [[32, 3], [256, 256]])
def test_an_image_is_on_several_ranks(mode: Any, size: int, counts: list[int]) -> None:
    ctx = sp.SequenceParallel(size, mode=mode, device_type="cuda")
    before, between, after = guard_module.images.text_lengths(counts, ctx, blocks=False)
    length = before + between + after + sum(counts)
    first = (before, before + counts[0])
    places = [first, (first[1] + between, first[1] + between + counts[1])]
    intervals = guard_module.images._plan(length, places, ctx, False).layout.intervals
    holders = [
        [any(a < end and b > begin for a, b in of_rank) for of_rank in intervals]
        for begin, end in places
    ]
    assert max(map(sum, holders)) > 1, intervals


# What is left behind


def test_guard_leaves_no_trace() -> None:
    settings = MemorySettings(
        offload="inputs+attention", pool_bytes=1 << 26, keep_attention=0.5, segment_layers=2
    )
    model = prepared("bf16", "mistral", settings=settings, sliding_window=300).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    came: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
    random, windows = torch.get_rng_state(), [layer.forward.window for layer in model.model.layers]
    guard(model, ONE)
    assert model.training and model.config._attn_implementation == hf.ATTENTION
    assert all(p.grad is None for p in model.parameters()) and came == []
    assert torch.equal(torch.get_rng_state(), random)
    assert (
        windows == [layer.forward.window for layer in model.model.layers] == [300] * 4
        and model.config.sliding_window == 300
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks
        for layer in model.model.layers
        for m in layer.modules()
    )


def test_guard_runs_the_layer_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from longfactory.memory import decoder_layer

    ran: list[bool] = []
    own = decoder_layer._Layer.apply
    monkeypatch.setattr(
        decoder_layer._Layer, "apply", lambda *a: ran.append(torch.is_grad_enabled()) or own(*a)
    )
    guard(prepared("bf16", "qwen3"), ONE)
    assert ran == [True] * 4


@pytest.mark.parametrize("frozen", [False, True])
def test_guard_of_a_model_with_adapters(frozen: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen3", torch.bfloat16)
    hf.prepare(model, ONE)
    torch.manual_seed(0)
    model = get_peft_model(
        model,
        LoraConfig(
            r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        ),
    )
    if frozen:
        model.requires_grad_(False)
        model.base_model.model.lm_head.requires_grad_(True)
    apply_memory(model, MemorySettings(), "cpu")
    guard(model, ONE)
    assert all(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))


# The rule


def test_tokens_that_changed_experts_do_not_count_but_a_block_does() -> None:
    draw = torch.Generator().manual_seed(0)
    reference = torch.randn(128, 32, generator=draw, dtype=torch.float64)
    own, run = (reference + 1e-3 * torch.randn(128, 32, generator=draw) for _ in range(2))
    unit = compare.rounding(torch.bfloat16)
    few = run.clone()
    few[::8] += 1.0
    assert compare.token_ratio(few, own, reference, [64, 64], unit) < 1.5
    block = run.clone()
    block[64:] *= 1.02
    assert compare.token_ratio(block, own, reference, [64, 64], unit) > compare.LIMIT
    assert compare.token_ratio(
        torch.full_like(run, torch.nan), own, reference, [64, 64], unit
    ) == float("inf")


def test_where_the_models_own_layer_overflows_there_is_no_measure() -> None:
    nothing = torch.full((64, 8), torch.nan)
    reference = torch.ones(64, 8, dtype=torch.float64)
    unit = compare.rounding(torch.float16)
    assert compare.token_ratio(nothing, nothing, reference, [64], unit) == 0.0
    assert compare.token_ratio(nothing, reference + 1e-3, reference, [64], unit) == float("inf")


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_four_bits_keep_their_bits_in_the_reference(sharded: bool) -> None:
    """They are stored in words of a float type, which FSDP2 can shard; cast to a wider one, they
    are other bits.
    """

    class Packed(nn.Parameter):
        quant_state: Any = None

    layer: Any = nn.Linear(4, 4)
    bits = torch.randn(8, 1)
    layer.weight = (
        nn.Parameter(bits, requires_grad=False) if sharded else Packed(bits, requires_grad=False)
    )
    # what FSDP2 gathers is a plain tensor
    (layer if sharded else layer.weight).quant_state = object()
    plain = compare.plain_layer(
        layer, {"weight": layer.weight.detach()} if sharded else {}, torch.float64
    )
    assert torch.equal(plain.weight, bits) and plain.weight.dtype == torch.float32
    assert plain.bias.dtype == torch.float64


def test_a_layer_is_perturbed_by_one_rounding_at_most() -> None:
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(64, 32, generator=draw).half() for _ in range(2))
    run = compare.LayerRun(nn.Linear(32, 32), 0, x=x.clone(), dy=dy.clone())
    for before, own, after in (
        (x, run.x, compare.perturbed(run, 1).x),
        (dy, run.dy, compare.perturbed(run, 1).dy),
    ):
        assert own is not None and after is not None and after.dtype == torch.float16
        moved = ((after.double() - before.double()) / before.double()).abs()
        assert torch.equal(own, before) and 0 < moved.max() < 2 * compare.rounding(torch.float16)
        assert (moved > 0).double().mean() > 0.25
    first, again, other = (compare.perturbed(run, seed).x for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_largest_sample_of_the_own_error_counts() -> None:
    nan = float("nan")
    first, second = (
        {"output": torch.tensor([1.0, 3.0, 1.0, nan])},
        {"output": torch.tensor([2.0, 1.0, nan, 1.0])},
    )
    found = compare.larger(first, second)["output"]
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 1.0, nan]), equal_nan=True)


def test_experts_of_the_comparison_take_any_type() -> None:
    """Kernels of grouped products refuse float64, in which float32 runs are held to account."""
    model = tiny_model("qwen3_moe", torch.float32)
    model.set_experts_implementation("grouped_mm")
    layer = model.model.layers[0]
    with guard_module.fixed.eager_experts(layer):
        assert layer.mlp.experts.config._experts_implementation == "eager"
    assert layer.mlp.experts.config._experts_implementation == "grouped_mm"


def test_plain_attention_is_attention() -> None:
    from longfactory.sp.probe import Asked
    from plain_attention import plain_attention, plain_mask

    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(20, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2)
    )
    sinks = torch.randn(4, generator=draw, dtype=torch.float64)
    for window, chunk, softcap in ((None, None, None), (5, None, 3.0), (None, 6, None)):
        expected: Tensor = plain_attention(
            q, k, v, plain_mask([sp.Segment(0, 20)], 20, window, chunk), 0.3, softcap, sinks
        )
        found = compare.plain_attention(q, k, v, Asked(0.3, window, chunk, softcap, True), sinks)
        torch.testing.assert_close(found, expected)
