"""The memory engine under FSDP2, DDP and sequence parallelism gives the gradients of one process
without it.
"""

from __future__ import annotations

import pytest

import memory_ranks
from longfactory.memory.settings import MemorySettings
from longfactory.testing import run_ranks
from memory_models import ALL, IN_SEGMENTS, assert_same_gradients, gradients, make_model, run

pytestmark = pytest.mark.processes

KEPT = MemorySettings(keep_attention=1.0, keep_mlp=1.0, mlp_chunk=5)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "settings", "engine", "first"),
    [
        ("llama", ALL, "fsdp2", "memory"),
        ("qwen3", ALL, "fsdp2", "wrap"),
        ("qwen2", IN_SEGMENTS, "fsdp2", "memory"),
        ("gemma2", ALL, "fsdp2", "memory"),
        ("gemma2", IN_SEGMENTS, "fsdp2", "wrap"),
        ("qwen3_moe", ALL, "fsdp2", "memory"),
        ("qwen2", ALL, "ddp", "memory"),
        ("qwen3_moe", KEPT, "fsdp2", "memory"),
        pytest.param("qwen3_moe", KEPT, "ddp", "memory", marks=pytest.mark.slow),
        pytest.param("gpt_oss", KEPT, "fsdp2", "wrap", marks=pytest.mark.slow),
        pytest.param("gpt_oss", ALL, "fsdp2", "wrap", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", IN_SEGMENTS, "ddp", "memory", marks=pytest.mark.slow),
        pytest.param("olmo2", ALL, "fsdp2", "memory", marks=pytest.mark.slow),
    ],
)
def test_two_ranks(kind, settings, engine, first, size, monkeypatch):
    model = make_model(kind, monkeypatch)
    run(model)
    wanted = gradients(model)
    for found in run_ranks(2, memory_ranks.sharded_gradients, kind, settings, engine, first, size):
        assert_same_gradients(found, wanted)


def test_lora_on_two_ranks(monkeypatch):
    model = memory_ranks.with_lora(make_model("qwen2", monkeypatch))
    run(model)
    wanted = gradients(model)
    for found in run_ranks(
        2, memory_ranks.sharded_gradients, "qwen2", ALL, "fsdp2", "memory", 2, lora=True
    ):
        assert_same_gradients(found, wanted)


@pytest.mark.parametrize("mode", ["ulysses", "llama3"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("settings", [ALL, IN_SEGMENTS], ids=["all", "segments"])
def test_other_schedules(settings, kind, mode, monkeypatch):
    model = make_model(kind, monkeypatch)
    run(model)
    wanted = gradients(model)
    for found in run_ranks(
        2, memory_ranks.sharded_gradients, kind, settings, "fsdp2", "memory", 2, mode=mode
    ):
        assert_same_gradients(found, wanted)


@pytest.mark.parametrize("mode", ["zigzag-ring", "llama3"])
def test_queries_are_multiplied_while_gradients_of_keys_travel_home(mode: str) -> None:
    for happened in run_ranks(2, memory_ranks.order_of_backward, mode):
        # the first wait is for keys and values
        assert happened == ["wait", "q", "wait", "k", "v"]
