"""Weights and gradients that FSDP2 sends without a copy are those that it copies, in every bit."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import uncopied_ranks
from longfactory.memory import uncopied
from longfactory.testing import run_ranks


@pytest.mark.processes
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "gathered again"])
@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [
        ("llama", torch.float32, False),
        ("qwen3_moe", torch.bfloat16, False),
        ("qwen3_moe", torch.float32, True),
    ],
)
def test_the_same_bits(kind: str, dtype: torch.dtype, lora: bool, keep: bool) -> None:
    for copied, uncopied_ in run_ranks(2, uncopied_ranks.both_ways, kind, dtype, keep, lora):
        for one, other in zip(copied[0], uncopied_[0], strict=True):
            assert one.keys() == other.keys()
            for name in one:
                assert torch.equal(one[name], other[name]), name
        assert copied[2] == uncopied_[2]
        assert set(copied[2].values()) == {4}
        # gradients always, weights where layers keep them
        assert uncopied_[1]["gradients"] > 2 * copied[1]["gradients"]
        assert (uncopied_[1]["weights"] > copied[1]["weights"]) is keep


@pytest.mark.parametrize(
    ("parameters", "told"),
    [("fsdp_params, grads", "takes fsdp_params grads"), (None, "returns other values")],
)
def test_another_fsdp2_is_left_alone(
    parameters: str | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = parameters or uncopied.EXPECTED["foreach_reduce"].replace(" ", ", ")
    foreach_reduce: Any = eval(f"lambda {names}: None")
    gather = _fsdp_param_group.foreach_all_gather
    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", foreach_reduce)
    with caplog.at_level(logging.WARNING):
        assert not uncopied.begin()
    assert f"FSDP2's foreach_reduce {told}" in caplog.text
    assert _fsdp_param_group.foreach_reduce is foreach_reduce
    assert _fsdp_param_group.foreach_all_gather is gather
