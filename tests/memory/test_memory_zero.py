"""The memory engine under DeepSpeed ZeRO gives the gradients of one process without it, as far as
fp32 can tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import memory_ranks
from longfactory.testing import RankPool
from memory_models import ALL, IN_SEGMENTS, assert_same_gradients, gradients, make_model, run

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Processes of their own: DeepSpeed changes the process that imports it."""
    pool = RankPool(2, keep_groups=True)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("kind", "settings", "stage", "lora"),
    [
        ("llama", ALL, 3, False),
        ("qwen2", IN_SEGMENTS, 3, False),
        ("gemma2", ALL, 3, False),
        ("qwen3_moe", ALL, 3, False),
        ("qwen2", ALL, 2, False),
        ("qwen2", ALL, 3, True),
    ],
)
def test_two_ranks(kind, settings, stage, lora, pool, monkeypatch):
    model = make_model(kind, monkeypatch)
    model = memory_ranks.with_lora(model) if lora else model
    run(model)
    wanted = gradients(model)
    for found in pool.run(memory_ranks.zero_gradients, kind, settings, stage, lora, timeout=200):
        assert_same_gradients(found, wanted, 3e-5)
