"""Files for LLaMA-Factory's Megatron back ends are read as runs."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping

BASE: dict[str, Any] = {
    "model_name_or_path": "m",
    "stage": "sft",
    "dataset": "d",
    "output_dir": "o",
    "dry_run": True,
}


def test_as_many_devices_share_a_sample() -> None:
    keys = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": "2"}
    more = {"context_parallel_size": 2, "mixed_precision": "bf16_mixed", "moe_grouped_gemm": True}
    cfg = from_mapping({**BASE, **keys, **more, "use_packed_sequences": False}, world_size=16)
    assert cfg.sequence_parallel_size == 8 and cfg.trainer.bf16 and not cfg.data.packing
    assert any("(sequence_parallel_size: 8)" in note for note in cfg.notes)
    assert "moe_grouped_gemm: no effect here." in cfg.notes
    own = from_mapping({**BASE, **keys, "sequence_parallel_size": 2}, world_size=16)
    assert own.sequence_parallel_size == 2
    one = from_mapping({**BASE, "use_distributed_optimizer": True})
    assert one.sequence_parallel_size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "fp8"}, "got fp8, expected one of bf16_mixed"),
        ({"megatron_pretrained_checkpoint": "x"}, "Megatron's checkpoints are not read"),
        ({"tensor_model_parallel_siz": 2}, "There is no key tensor_model_parallel_siz"),
    ],
)
def test_what_there_is_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({**BASE, "use_distributed_optimizer": True, **changes})
