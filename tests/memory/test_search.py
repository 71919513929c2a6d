"""What is chosen, the longest row, and the advice beside it."""

from __future__ import annotations

import dataclasses
import types

import pytest

from known_sizes import QWEN_7B
from longfactory.memory.budget import MARGIN, budget, fits
from longfactory.memory.report import advice
from longfactory.memory.search import CAREFUL, candidates, choose, longest
from longfactory.memory.seconds import seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob, machine
from longfactory.memory.technique import techniques
from planned_jobs import ONE, SHAPES, TWO, GiB, jobs_of, saved


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
    fitting = {}
    for settings in candidates(job, "auto"):
        taken = budget(job, settings, timed=False)
        if fits(job, taken, 0.85):
            full = taken.gpu_total / job.machine.gpu_bytes
            pinned = taken.host_total / job.machine.host_bytes
            more = 0.002 * (full + pinned) + 0.03 * max(0.0, full - CAREFUL) / (MARGIN - CAREFUL)
            fitting[settings] = seconds(job, settings) * (1 + more)

    assert ok and found == min(fitting, key=fitting.__getitem__)
    assert needs.seconds == seconds(job, found)


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
