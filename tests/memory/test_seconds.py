"""Seconds of a step."""

from __future__ import annotations

import dataclasses

import pytest

from known_sizes import qwen_7b
from longfactory.memory.seconds import ATTENTION_SHARE, seconds, tower_seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, Tower, TrainingJob, machine
from longfactory.sp import SequenceParallel
from planned_jobs import ONE, SHAPE, TWO, GiB, saved


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


def test_keeping_attention_saves_one_of_its_forwards():
    saved = seconds(TWO, MemorySettings(keep_attention=0.0)) - seconds(
        TWO, MemorySettings(keep_attention=1.0)
    )
    attention = TWO.local * 2.0 * TWO.tokens * 28 * 128 * 28 / TWO.machine.attention_forward
    assert saved == pytest.approx(1.005 * attention / ATTENTION_SHARE, rel=1e-6)


def test_a_group_that_spans_hosts_pays_for_its_messages():
    def step(gpus: int, per_host: int, network: float) -> float:
        where = machine("H100", gpus, 2**40, gpus_per_host=per_host, network=network)
        return seconds(TrainingJob(SHAPE, where, 65536, sp=gpus), saved())

    assert step(8, 8, 1e9) == step(8, 8, 1e12), "nothing leaves the host"
    assert step(8, 4, 2e9) > 1.5 * step(8, 8, 2e9)
    # but for what kernels lose beside messages that wait longer
    assert step(8, 4, 1e12) == pytest.approx(step(8, 8, 1e12), rel=0.002)
