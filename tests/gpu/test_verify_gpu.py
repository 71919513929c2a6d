"""`longfactory verify` on GPUs: every precision, the kernels that train, experts; one GPU, and two
under DDP, FSDP2 and ZeRO-3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "pure_bf16": {"bf16": True, "pure_bf16": True},
    "fp16": {"fp16": True},
}


def verified(
    folder: Path, family: str, processes: int, *options: str, **keys: Any
) -> subprocess.CompletedProcess[str]:
    """The command, on a tiny model with the real heads' dim."""
    from verify_ratios import make_folder

    model = folder / family
    if not model.exists():
        make_folder(model, family, 0.1, hidden_size=256, head_dim=64)
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "train_from_scratch": True,
        "stage": "sft",
        "dataset": "manual_sft",
        "dataset_dir": ROOT / "data",
        "template": "chatml",
        "max_samples": 12,
        "cutoff_len": 600,
        "finetuning_type": "full",
        "per_device_train_batch_size": 2,
        "sequence_parallel_size": processes,
        **keys,
    }
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in given.items()]
    env = {**os.environ, "LONGFACTORY_CACHE": str(folder / "cache")}
    command = [
        sys.executable,
        "-m",
        "longfactory.cli",
        "verify",
        *words,
        f"nproc_per_node={processes}",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3_moe", "gpt_oss"])
def test_one_gpu(family: str, precision: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = verified(tmp_path_factory.mktemp("verify"), family, 1, **PRECISIONS[precision])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_two_gpus(precision: str, sharding: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("verify")
    for family, keys in (
        ("qwen2", {}),
        ("qwen3_moe", {}),
        ("qwen2", {"stage": "dpo", "dataset": "manual_dpo", "finetuning_type": "lora"}),
    ):
        done = verified(folder, family, 2, sharding=sharding, **PRECISIONS[precision], **keys)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]


SHARDED: dict[str, dict[str, Any]] = {
    "ddp": {"sharding": "ddp"},
    "fsdp2": {"sharding": "fsdp2"},
    "zero3": {"deepspeed": ROOT / "examples" / "deepspeed" / "ds_z3_config.json"},
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", list(SHARDED))
def test_one_run_each_on_two_gpus(sharding: str, tmp_path: Path) -> None:
    """bf16, a sliding window, and all that the report has."""
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html")}
    options = [f"--{kind}={path}" for kind, path in files.items()]
    done = verified(
        tmp_path,
        "mistral",
        2,
        *options,
        "verify_tokens=400",
        bf16=True,
        cutoff_len=2048,
        **SHARDED[sharding],
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads(files["json"].read_text())
    assert report["exact"] and report["causes"] == []
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states == {
        "tokens of each layer": "passed",
        "rows and labels": "passed",
        "untrained tokens": "passed",
        "documents and later tokens": "passed",
        "window 48": "passed",
    }
    assert {"ddp": "ddp", "fsdp2": "fsdp2", "zero3": "deepspeed"}[sharding] in report["title"]
    assert "<svg" in files["html"].read_text()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("glm4_moe", {}),
        ("qwen3_moe", {"finetuning_type": "lora"}),
        ("qwen2", {"pure_bf16": True}),
    ],
    ids=["glm4_moe", "qwen3_moe lora", "qwen2 pure_bf16"],
)
def test_a_checkpoint_that_one_process_reads(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Under FSDP2 the other process is sent weights and buffers (the correction of a router's
    scores); the comparison reads the files by itself.
    """
    from longfactory.testing import tiny_model
    from small_runs import write_tokenizer

    vocabulary = write_tokenizer(tmp_path / family)
    model = tiny_model(family, seed=1, vocab_size=vocabulary, hidden_size=256, head_dim=64)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1)
    model.save_pretrained(tmp_path / family)
    keys = {"sharding": "fsdp2", "bf16": True, "train_from_scratch": False, **keys}
    done = verified(tmp_path, family, 2, **keys)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_the_reading_process_refuses_ends_both(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from longfactory.testing import tiny_model
    from small_runs import write_tokenizer

    vocabulary = write_tokenizer(tmp_path / "qwen2")
    tiny_model("qwen2", vocab_size=vocabulary, hidden_size=256).save_pretrained(tmp_path / "qwen2")
    file, lost = tmp_path / "qwen2" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    keys = {"sharding": "fsdp2", "bf16": True, "train_from_scratch": False}
    done = verified(tmp_path, "qwen2", 2, **keys)
    assert done.returncode == 2, done.stdout + done.stderr[-2000:]
    assert done.stderr.count(f"its files have no weights for {lost}") == 1
