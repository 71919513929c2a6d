"""Processes, their groups and DeepSpeed's file: every contradiction has its sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import from_mapping
from smallest_run import BASE, problem

REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {
            "sequence_parallel_mode": "usp",
            "sequence_parallel_size": 8,
            "sequence_parallel_ulysses_degree": 2,
            "sequence_parallel_ring_degree": 2,
        },
        "2 x sequence_parallel_ring_degree 2 = 4, and sequence_parallel_size is 8",
    ),
    (
        {
            "sequence_parallel_mode": "usp",
            "sequence_parallel_size": 8,
            "sequence_parallel_ring_degree": 3,
        },
        "3 does not divide",
    ),
    (
        {"sequence_parallel_size": 8, "sequence_parallel_ulysses_degree": 4},
        "Set usp, or leave them out",
    ),
    ({"ddp_backend": "ncll"}, "ddp_backend: ncll is not a choice. Choose from nccl, gloo"),
    ({"ddp_backend": "nccl", "use_cpu": True}, "ddp_backend: nccl needs GPUs, and use_cpu"),
    (
        {
            "do_train": False,
            "do_predict": True,
            "predict_with_generate": True,
            "eval_dataset": "e",
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
        "do_predict without training does not use DeepSpeed",
    ),
    (
        {
            "do_train": False,
            "do_eval": True,
            "eval_dataset": "e",
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
        "do_eval without training uses DeepSpeed only with ZeRO-3",
    ),
    ({"deepspeed": "absent.json"}, "there is no file absent.json"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2}}, "sharding": "fsdp2"},
        "deepspeed and sharding: fsdp2",
    ),
    (
        {
            "deepspeed": {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}
            },
            "pure_bf16": True,
        },
        "optimizer on the host keeps float32",
    ),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}, "quantization_bit": 4}, "ZeRO-2"),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}, "pissa_init": True}, "ZeRO-2"),
]


@pytest.mark.parametrize(("keys", "words"), REFUSALS, ids=[" ".join(k) for k, _ in REFUSALS])
def test_refused(keys: dict[str, Any], words: str) -> None:
    assert words in problem(**keys)


@pytest.mark.parametrize(("world", "size"), [(1, 1), (8, 8), (8, 2), (6, 3)])
def test_sequence_parallel_size_divides_the_processes(world: int, size: int) -> None:
    from_mapping({**BASE, "sequence_parallel_size": size}, world_size=world)


def test_sequence_parallel_size_that_does_not_divide() -> None:
    assert "needs 4 processes or a multiple, and 1 would start" in problem(
        1, sequence_parallel_size=4
    )
    assert "does not divide the 8 processes. Use 2, or 6 processes" in problem(
        8, sequence_parallel_size=3
    )


def test_the_launcher_s_environment_tells_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "does not divide the 3 processes" in problem(sequence_parallel_size=2)


def test_lengths_need_not_divide() -> None:
    """The row is padded at its end: any length goes with any size, packed or not."""
    from_mapping(
        {**BASE, "cutoff_len": 1001, "sequence_parallel_size": 8, "neat_packing": True},
        world_size=8,
    )


def test_deepspeed_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "is not valid JSON" in problem(deepspeed=str(bad))
    bad.write_text("[]")
    assert "is not a JSON object" in problem(deepspeed=str(bad))


@pytest.mark.parametrize("name", ["z0", "z2", "z2_offload", "z3", "z3_offload"])
def test_the_deepspeed_files_that_everyone_quotes(name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "deepspeed" / f"ds_{name}_config.json"
    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[1])
    assert ("offload_optimizer" in zero) == name.endswith("offload")
    # Left to DeepSpeed these mean clipping at 1.0 and sums in bf16.
    assert config["gradient_clipping"] == "auto" and config["communication_data_type"] == "fp32"
    assert name[1] != "3" or zero["stage3_gather_16bit_weights_on_model_save"] is True
