"""The memory and time model: its arithmetic, its choices, and what it says."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
from transformers import AutoConfig

from longfactory.memory.cost import (
    ATTENTION_SHARE,
    CAREFUL,
    MARGIN,
    WHOLE,
    bare_model,
    budget,
    candidates,
    choose,
    fits,
    longest,
    moments,
    seconds,
    techniques,
    tower_seconds,
    working_set,
)
from longfactory.memory.offload import stored_bytes
from longfactory.memory.report import advice
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, Tower, TrainingJob, kind_of, machine
from longfactory.sp import SequenceParallel
from qwen_7b import QWEN_7B, qwen_7b

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


def saved(**keys: Any) -> MemorySettings:
    """Every layer recomputed but for its attention, whose output is saved."""
    return MemorySettings(keep_attention=1.0, **keys)


def test_parameters_of_the_shape():
    assert SHAPE.parameters == pytest.approx(7.6153e9, rel=1e-4)
    assert SHAPE.layer_parameters == 3584 * 128 * 2 * 32 + 3 * 3584 * 18944


def test_states_of_one_and_of_two_gpus():
    found = budget(TWO, saved())
    states = found.gpu["weights"] + found.gpu["optimizer"]
    assert states == pytest.approx(12 * SHAPE.parameters / 2) and "optimizer" not in found.host
    found = budget(ONE, saved(optimizer="host"))
    assert found.gpu["weights"] == pytest.approx(2 * SHAPE.parameters)
    assert "optimizer" not in found.gpu
    assert found.host["optimizer"] == pytest.approx(10 * SHAPE.parameters)


def test_seconds_of_a_vision_tower():
    """One pass where it is frozen, four where it is trained, one more for a reference."""
    tower = Tower(
        parameters=400_000_000,
        of_a_patch=27 * (8 * 1152 + 2 * 4304),
        levels=4,
        hidden=3584,
        batch=16384,
        trained=False,
        linear=8.2e8,
        attention=1.2e5,
        patches=4.0,
        seen=2048.0,
    )
    once = tower_seconds(dataclasses.replace(ONE, tower=tower))
    here = dataclasses.replace(ONE, machine=machine("H200", 1, 256 * GiB), tokens=4096, tower=tower)
    assert tower_seconds(here) == pytest.approx(0.068, rel=0.1)  # measured
    plain = seconds(ONE, saved())
    for trained, passes in ((False, 1), (True, 4)):
        job = dataclasses.replace(ONE, tower=dataclasses.replace(tower, trained=trained))
        assert seconds(job, saved()) - plain == pytest.approx(1.005 * passes * once, rel=1e-6)
    compared = dataclasses.replace(ONE, reference_passes=1)
    job = dataclasses.replace(compared, tower=tower)
    assert seconds(job, saved()) - seconds(compared, saved()) == pytest.approx(
        1.005 * 2 * once, rel=1e-6
    )


def test_rates_of_kinds_of_gpu():
    """`auto` weighs messages by the kind's links: Hopper's rates are the engine's own, a GPU on
    PCIe hides a message behind more work.
    """
    weighs = {
        name: machine(name, 8, 2**40).flop_per_byte
        for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S")
    }
    usual = SequenceParallel().flop_per_byte
    assert weighs["NVIDIA H100 80GB HBM3"] == pytest.approx(usual, rel=1e-12)
    assert weighs["NVIDIA A100-SXM4-80GB"] < weighs["NVIDIA H100 80GB HBM3"] < weighs["NVIDIA L40S"]
    step = [
        seconds(dataclasses.replace(TWO, machine=machine(name, 2, 2**40)), saved())
        for name in ("A800", "A100")
    ]
    assert step[0] >= step[1], "the same chip with slower links"


def test_checkpoints_of_every_layer():
    """200.7 KB of layer inputs and 203.8 KB of attention a token, wherever they wait."""
    for settings in (
        saved(),
        saved(offload="inputs"),
        saved(offload="inputs+attention", last_layers_on_gpu=5),
    ):
        gpu, host = stored_bytes(TWO, settings)
        assert (gpu + host) / TWO.local == 28 * (7168 + SHAPE.saved_attention_bytes)
    gpu, host = stored_bytes(
        TWO, MemorySettings(keep_attention=0.0, offload="inputs", last_layers_on_gpu=4)
    )
    assert gpu / TWO.local == 4 * 7168
    assert host / TWO.local == 24 * 7168


def test_segments_of_four_take_less_than_half():
    gpu, host = stored_bytes(
        TWO,
        MemorySettings(
            keep_attention=0.0, segment_layers=4, offload="inputs+attention", last_layers_on_gpu=0
        ),
    )
    assert (gpu + host) / TWO.local < 0.5 * 28 * 7168


def test_groups_of_heads_shrink_the_working_set():
    def of_a_token(shape: ModelShape, **keys: Any) -> float:
        job = dataclasses.replace(TWO, shape=shape, tokens=2**20, sp=1)
        return working_set(job, saved(mlp_chunk=4096, **keys)) / 2**20

    assert of_a_token(SHAPE, attention_groups=4) < 40_000 < of_a_token(SHAPE)
    generic = dataclasses.replace(SHAPE, written_layer=False)
    assert of_a_token(generic) > of_a_token(SHAPE)


def test_every_technique_is_a_field_with_its_default_among_the_values():
    keys = [technique.key for technique in techniques()]
    fields = {field.name: field for field in dataclasses.fields(MemorySettings)}
    assert len(set(keys)) == len(keys) and set(keys) == fields.keys() - {"pool_bytes", "layer"}
    assert len({technique.depth for technique in techniques()}) == len(keys)
    job = dataclasses.replace(TWO, leavable=True)
    for technique in techniques():
        offload = "none" if technique.key == "keep_mlp" else "inputs"
        at = MemorySettings(offload=offload, optimizer="host")
        values = technique.values(job, "auto", at)
        assert fields[technique.key].default in values and len(set(values)) == len(values)
        assert len(values) > 1


def test_saved_mlp_products_take_bytes_and_spare_products():
    """4 bytes a number of the MLP's width, token and layer in bf16; and time, by share."""
    shares = (0.0, 0.5, 1.0)
    found = [budget(TWO, saved(keep_mlp=share)) for share in shares]
    whole = 4 * SHAPE.ffn * TWO.local * SHAPE.layers
    item = "saved MLP products"
    assert [b.gpu.get(item, 0.0) / whole for b in found] == pytest.approx(shares, rel=0.01)
    assert found[0].seconds > found[1].seconds > found[2].seconds
    generic = dataclasses.replace(SHAPE, written_layer=False)
    assert item not in budget(dataclasses.replace(TWO, shape=generic), saved(keep_mlp=1.0)).gpu


def test_gradients_come_while_what_waits_goes():
    """The peak holds one or the other, except where gradients are there from the start."""
    settings = saved(mlp_chunk=8192)
    late = budget(TWO, settings).gpu_total
    waits, gradients = stored_bytes(TWO, settings)[0], 4 * SHAPE.parameters / 2
    early = budget(dataclasses.replace(TWO, accumulates=True), settings).gpu_total
    assert 0.9 * min(waits, gradients) < early - late < 1.1 * min(waits, gradients)


# Tokens, settings, and the bytes that torch counted at the peak of the step (benchmarks/results: two
# H200, one H100).
MEASURED = {
    "32k": (dataclasses.replace(TWO, tokens=32768), saved(), 62.9),
    "128k": (TWO, saved(), 86.9),
    "256k": (
        dataclasses.replace(TWO, tokens=262144),
        saved(offload="inputs", mlp_chunk=32768),
        83.2,
    ),
    "256k on one": (
        ONE,
        MemorySettings(
            keep_attention=0.75,
            offload="inputs+attention",
            last_layers_on_gpu=7,
            mlp_chunk=8192,
            segment_layers=2,
            optimizer="host",
        ),
        52.0,
    ),
    "512k": (
        dataclasses.replace(TWO, tokens=524288),
        saved(offload="inputs+attention", last_layers_on_gpu=3, mlp_chunk=32768),
        82.3,
    ),
    "768k": (
        dataclasses.replace(TWO, tokens=786432),
        saved(
            offload="inputs+attention",
            last_layers_on_gpu=14,
            mlp_chunk=4096,
            attention_groups=4,
            late_prefetch=True,
            optimizer="host",
        ),
        108.3,
    ),
    "192k of 14B": (
        dataclasses.replace(TWO, shape=SHAPE_14B, tokens=196608),
        saved(
            offload="inputs+attention",
            last_layers_on_gpu=12,
            mlp_chunk=4096,
            attention_groups=2,
            late_prefetch=True,
        ),
        121.2,
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_peaks_are_those_that_were_measured(name):
    """Within 4 %: half of what is left free (`MARGIN`)."""
    job, settings, peak = MEASURED[name]
    found = budget(job, settings)
    assert (found.gpu_total - found.gpu["runtime"]) / GiB == pytest.approx(peak, rel=0.04)


def test_random_weights_are_whole_before_they_are_sharded():
    """Two runs of two GPUs (benchmarks/results/plan_accuracy.md): 14B 41.5 GiB, where a step takes
    28, and of 7B 61.7, where a step takes more.
    """
    lora = dataclasses.replace(SHAPE_14B, trainable=34_406_400, adapters=True, head_trained=False)
    job = dataclasses.replace(TWO, shape=lora, tokens=16384)
    plain, made = (budget(dataclasses.replace(job, made_here=here), saved()) for here in (0, 1))
    assert plain.gpu_total / GiB == pytest.approx(28, rel=0.05) and WHOLE not in plain.gpu
    assert (made.gpu_total - made.gpu["runtime"]) / GiB == pytest.approx(41.5, rel=0.02)
    assert made.gpu[WHOLE] == 2 * made.gpu["weights"] and made.seconds == plain.seconds
    small = dataclasses.replace(job.machine, gpu_bytes=int(made.gpu_total))
    assert fits(dataclasses.replace(job, machine=small), plain, 0.85)
    assert not fits(dataclasses.replace(job, machine=small), made, 0.85)
    for other in ({"sharded": False}, {"zero": 3}):
        job = dataclasses.replace(TWO, made_here=True, **other)
        assert WHOLE not in budget(job, saved()).gpu
    longer = dataclasses.replace(TWO, made_here=True)
    assert budget(longer, saved()) == budget(dataclasses.replace(TWO, made_here=False), saved())


def test_a_short_step_waits_for_what_starts_its_kernels():
    """Two steps of 1.5B parameters under FSDP2 on two H200: 0.48 s with rows of 4,096 tokens, 0.50
    with 16,384.
    """
    shape = ModelShape.of(
        qwen_7b(
            hidden_size=1536,
            intermediate_size=8960,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    job = dataclasses.replace(TWO, shape=shape)
    for tokens, taken in ((4096, 0.483), (16384, 0.496)):
        assert seconds(dataclasses.replace(job, tokens=tokens), saved()) == pytest.approx(
            taken, rel=0.05
        )
    long = dataclasses.replace(job, tokens=131072)
    none = dataclasses.replace(long, machine=dataclasses.replace(long.machine, layer_start=0.0))
    assert seconds(long, saved()) == seconds(none, saved()) > 1
    assert seconds(dataclasses.replace(job, tokens=4096, sharded=False), saved()) < 0.4


def test_what_is_gathered_of_the_embedding_and_the_output_layer():
    """FSDP2 has an untied output layer until its gradient is reduced, and fetches the embedding for
    the end of backward; ZeRO-3 may hold both.
    """
    one = 2 * SHAPE.head_parameters

    def gathered(**changes):
        shape = dataclasses.replace(SHAPE, tied=changes.pop("tied", False))
        job = dataclasses.replace(TWO, shape=shape, **changes)
        bare = dataclasses.replace(job, sharded=False)
        each = zip(bare_model(job)["output layer"], bare_model(bare)["output layer"], strict=True)
        return [sharded - whole for sharded, whole in each]

    assert gathered() == [one, 0, one]
    assert gathered(tied=True) == [one, 2 * one, 2 * one]
    assert gathered(zero=3) == [3 * one, 3 * one, 3 * one]


def test_keeping_attention_saves_one_of_its_forwards():
    saved = seconds(TWO, MemorySettings(keep_attention=0.0)) - seconds(
        TWO, MemorySettings(keep_attention=1.0)
    )
    attention = TWO.local * 2.0 * TWO.tokens * 28 * 128 * 28 / TWO.machine.attention_forward
    assert saved == pytest.approx(1.005 * attention / ATTENTION_SHARE, rel=1e-6)


@pytest.mark.parametrize("job", [TWO, ONE])
@pytest.mark.parametrize("mode", ["auto", "fast", "long"])
def test_what_is_chosen_fits(job, mode):
    settings, found, ok = choose(job, mode)
    assert ok == fits(job, found, 0.85)
    if mode == "fast":
        assert (
            settings.offload == "none"
            and settings.segment_layers == 1
            and settings.optimizer == "gpu"
        )
    if mode != "fast":
        assert ok


def test_short_rows_stay_on_the_gpu_and_long_ones_leave_it():
    short, _, _ = choose(dataclasses.replace(TWO, tokens=16384))
    assert short.offload == "none" and short.keep_attention in (0.0, 1.0)
    long, _, ok = choose(dataclasses.replace(TWO, tokens=786432))
    assert ok and long.offload != "none" and long.mlp_chunk is not None


def test_the_last_fifth_of_the_gpu_is_taken_for_a_gain_alone():
    """At 262,144 tokens there are settings that fill more of it, and gain a thousandth."""
    full = [
        budget(j, choose(j)[0]).gpu_total / j.machine.gpu_bytes
        for j in (dataclasses.replace(TWO, tokens=t) for t in (262144, 786432))
    ]
    assert full[0] < CAREFUL < full[1] < MARGIN


def test_what_the_user_set_is_kept():
    settings, _, _ = choose(
        TWO,
        "auto",
        0.85,
        {"keep_attention": 0.5, "offload": "any", "mlp_chunk": 1000, "segment_layers": 2},
    )
    assert (settings.keep_attention, settings.mlp_chunk, settings.segment_layers) == (0.5, 1000, 2)
    assert settings.offload != "none"


def test_longest_grows_with_each_mode_and_is_tight():
    one = {mode: longest(ONE, mode) for mode in ("fast", "auto", "long")}
    assert one["fast"] < one["auto"]
    assert one["auto"] >= 262144
    best = one["auto"]
    assert choose(dataclasses.replace(ONE, tokens=best))[2]
    assert not choose(dataclasses.replace(ONE, tokens=best + 8192))[2]


def test_mixture_of_experts_computes_less_than_it_stores():
    moe = ModelShape.of(
        types.SimpleNamespace(
            **QWEN_7B,
            model_type="qwen3_moe",
            num_experts=64,
            num_experts_per_tok=4,
            moe_intermediate_size=768,
            head_dim=128,
        )
    )
    assert moe.layer_parameters > 4 * moe.active_layer_parameters
    assert moe.written_layer
    assert budget(dataclasses.replace(TWO, shape=moe), saved()).seconds > 0


def test_fp32_is_planned_as_what_will_run():
    """Activations of twice the size, products and attention at the rates of fp32, and a line that
    says what to set.
    """
    wide = dataclasses.replace(TWO, shape=ModelShape.of(qwen_7b(), width=4))
    for c in (saved(), MemorySettings(checkpoint="none"), saved(mlp_chunk=4096)):
        half, full = budget(TWO, c), budget(wide, c)
        waits = (
            "activations" if c.checkpoint == "none" else "layer inputs and saved attention outputs"
        )
        # norms store fp32 in either
        times = 1.8 if c.checkpoint == "none" else 1.95
        assert full.gpu[waits] >= times * half.gpu[waits]
        assert full.gpu["weights"] == half.gpu["weights"]
        assert full.gpu.get("working set of a layer", 0.0) >= 1.95 * half.gpu.get(
            "working set of a layer", 0.0
        )
        assert full.seconds >= 10 * half.seconds
    rounded = dataclasses.replace(wide, machine=machine("H200", 2, 256 * GiB, tf32=True))
    assert 2 * seconds(TWO, saved()) < seconds(rounded, saved()) < seconds(wide, saved()), (
        "tf32 is for products, not for attention"
    )


def test_a_model_that_fits_many_times_over_stays_as_it_is():
    """Where messages between GPUs take longer than everything else, all ways are as fast: the one
    with the least to do is taken.
    """
    small = types.SimpleNamespace(
        **{
            **QWEN_7B,
            "model_type": "qwen2",
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "vocab_size": 500,
        }
    )
    small.num_attention_heads, small.num_key_value_heads = 4, 2
    settings, _, ok = choose(
        TrainingJob(ModelShape.of(small), machine("H100", 8, 2**40), 512, sp=8)
    )
    # where all wait for what starts their kernels, the MLPs' products may be saved or not
    assert ok and dataclasses.replace(settings, keep_mlp=0.0, keep_weights=False) in (
        MemorySettings(checkpoint="none"),
        saved(),
    )


def test_layers_of_different_heads_are_planned_by_the_widest() -> None:
    """Gemma 4: its configuration names no head dim for all layers, and reading one raises."""
    import torch

    from longfactory.memory.apply import _attention_share
    from longfactory.sp.hf import head_dims, values_of_layers
    from longfactory_dev.tiny_models import tiny_config

    config = tiny_config("gemma4").get_text_config()
    assert sorted(values_of_layers(config, "head_dim")) == [16, 512]
    assert ModelShape.of(config).head_dim == 512
    assert head_dims(config) == {(16, 16), (512, 512)}
    assert _attention_share(config, torch.bfloat16) == 4 * (512 + 2) / 64
    assert len(values_of_layers(tiny_config("llama"), "head_dim")) == 1


def test_layers_of_different_widths_are_planned_by_the_widest() -> None:
    """Gemma 3n: its configuration lists a width for each layer."""
    from longfactory_dev.tiny_models import tiny_config

    shape = ModelShape.of(tiny_config("gemma3n_text", intermediate_size=[96, 96, 192, 96]))
    assert shape.ffn == 192
    assert shape.layer_parameters == shape.kinds[0].mixer_parameters + 3 * 192 * 64


# ---- several hosts, DeepSpeed, quantised weights -------------------------------------------------


def test_a_group_that_spans_hosts_pays_for_its_messages():
    def step(gpus: int, per_host: int, network: float) -> float:
        where = machine("H100", gpus, 2**40, gpus_per_host=per_host, network=network)
        return seconds(TrainingJob(SHAPE, where, 65536, sp=gpus), saved())

    assert step(8, 8, 1e9) == step(8, 8, 1e12), "nothing leaves the host"
    assert step(8, 4, 2e9) > 1.5 * step(8, 8, 2e9)
    # but for what kernels lose beside messages that wait longer
    assert step(8, 4, 1e12) == pytest.approx(step(8, 8, 1e12), rel=0.002)


def test_what_zero_shards():
    where = machine("H100", 8, 2**40)
    p = SHAPE.parameters
    for stage, weights, gradients in ((1, 2 * p, 2 * p), (2, 2 * p, 2 * p / 8), (3, p / 4, p / 4)):
        job = TrainingJob(SHAPE, where, 8192, zero=stage, state_bytes=12, accumulates=True)
        found = budget(job, saved()).gpu
        assert found["weights"] == pytest.approx(weights)
        assert found["gradients"] == pytest.approx(gradients)
        assert found["optimizer"] == pytest.approx(12 * p / 8), "fp32 copies and both moments"


def test_quantised_weights_take_their_bits():
    frozen = dataclasses.replace(SHAPE, trainable=2**20, adapters=True, written_layer=False)
    linear = SHAPE.layers * SHAPE.layer_parameters
    four = dataclasses.replace(frozen, quantized=linear, quantized_bytes=0.516)
    for shape, weights in (
        (frozen, 2 * SHAPE.parameters),
        (four, 2 * (SHAPE.parameters - linear) + 0.516 * linear),
    ):
        job = TrainingJob(shape, machine("H100", 1, 2**40), 8192, sharded=False)
        assert budget(job, saved()).gpu["weights"] == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h200", "H200"),
        ("NVIDIA L400", None),
        ("GeForce GT 710", None),
    ],
)
def test_kinds_of_gpu_by_their_names(name: str, kind: str | None):
    assert kind_of(name) == kind


@pytest.mark.parametrize("name", [each.key for each in techniques() if each.ordered])
def test_what_is_ordered_is_slower_and_leaner(name: str):
    """The search leaves out values by it."""
    technique = next(each for each in techniques() if each.key == name)
    others = [candidates(job, "auto", "first") for job in (TWO, ONE)]
    for job, settings in zip((TWO, ONE), map(list, others), strict=True):
        for each in settings[:: max(1, len(settings) // 20)]:
            values = technique.values(job, "auto", each)
            changed = [dataclasses.replace(each, **{name: value}) for value in values]
            if each.checkpoint == "none":
                continue
            times = [seconds(job, settings) for settings in changed]
            sizes = [budget(job, settings, timed=False).gpu_total for settings in changed]
            assert times == sorted(times) and sizes == sorted(sizes, reverse=True)


def test_of_equals_the_one_that_pins_less() -> None:
    """A million tokens of 7B on four H200: what fits the GPUs stays there, at the same time."""
    job = dataclasses.replace(TWO, tokens=1 << 20, sp=4, machine=machine("H200", 4, 500 * GiB))
    settings, needs, ok = choose(job)
    assert ok and settings.keep_attention == 1.0
    assert needs.host_total < 200 * GiB, "it was 381 GiB"


@pytest.mark.parametrize("tokens", [32768, 262144])
def test_the_search_finds_what_looking_at_all_finds(tokens: int):
    job = dataclasses.replace(TWO, tokens=tokens)
    found, needs, ok = choose(job)
    fitting = [s for s in candidates(job, "auto") if fits(job, budget(job, s, timed=False), 0.85)]

    def key(settings: MemorySettings) -> float:
        needs = budget(job, settings, timed=False)
        full = needs.gpu_total / job.machine.gpu_bytes
        pinned = needs.host_total / job.machine.host_bytes
        more = 0.002 * (full + pinned) + 0.03 * max(0.0, full - CAREFUL) / (MARGIN - CAREFUL)
        return seconds(job, settings) * (1 + more)

    assert ok and found == min(fitting, key=key) and needs.seconds == seconds(job, found)


# ---- adapters, and what is chosen ----------------------------------------------------------------

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


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_adapters_reach_longer_rows_than_all_parameters(name: str, gpus: int):
    reached = {way: longest(job) for way, job in jobs_of(name, gpus).items()}
    assert reached["lora"] >= max(reached["full"], reached["split"])


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_advice_agrees_with_the_numbers(name: str, gpus: int):
    """What is said to make room takes less, with the settings that did not fit."""
    for tokens in (65536, 1048576):
        jobs = jobs_of(name, gpus, tokens)
        for way, better, words in (
            ("full", "lora", "finetuning_type: lora"),
            ("lora", "qlora", "quantization_bit: 4"),
        ):
            settings, needs, _ = choose(jobs[way])
            less = budget(jobs[better], settings).gpu_total < needs.gpu_total
            assert (words in advice(jobs[way], settings)) == less


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "split", "lora"])
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_that_fits_is_faster_than_what_is_chosen(name: str, way: str):
    """By the same cost model, over every combination of techniques; but for the percent that room
    is worth.
    """
    for gpus, tokens in ((1, 32768), (8, 262144)):
        job = jobs_of(name, gpus, tokens)[way]
        _, chosen, ok = choose(job)
        fitting = [
            found.seconds
            for settings in candidates(job, "auto")
            if fits(job, found := budget(job, settings), 0.85)
        ]
        assert ok == bool(fitting)
        if ok:
            assert chosen.seconds <= 1.035 * min(fitting)


def test_ddp_holds_gradients_twice():
    """In its buckets from the start, and as they come: it has no view of the one in the other."""
    where = machine("H100", 2, 2**40)
    job = TrainingJob(SHAPE, where, 8192, sharded=False)
    assert job.ddp and job.autocast and not job.written_layer
    given = [moment["gradients"] for moment in moments(job, saved())]
    every = 4 * SHAPE.parameters
    assert given[0] == every and given[2] == pytest.approx(2 * every, rel=0.12) and given[2] > every
    more = dataclasses.replace(job, accumulates=True)
    assert [moment["gradients"] for moment in moments(more, saved())] == [2 * every] * 3
