"""LoRA on a GPU on weights that hqq, GPTQ or AWQ packed: what LoRA trains on the ordinary weights
that they stand for.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import packed_checkpoints
from longfactory.config import load_config
from longfactory.config.arguments import ModelArguments
from longfactory.model import load
from longfactory.sp import hf
from small_runs import LORA, keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def losses(home: Path, name: str, **changes: Any) -> list[float]:
    from longfactory.train.run import run

    given = keys(home, name, use_cpu=None, bf16=True, **{**LORA, **changes})
    run(load_config([f"{k}={v}" for k, v in given.items()]))
    lines = (home / name / "trainer_log.jsonl").read_text().splitlines()
    found = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
    print(name, " ".join(f"{loss:.4f}" for loss in found), flush=True)
    return found


def write_talks(home: Path) -> None:
    draw = random.Random(0)
    rows = [
        {"instruction": "abc", "output": "".join(draw.choices("abcdefgh ", k=60))}
        for _ in range(12)
    ]
    (home / "talks.json").write_text(json.dumps(rows))
    (home / "dataset_info.json").write_text('{"talks": {"file_name": "talks.json"}}')


def alike(home: Path, whole: Path, **changes: Any) -> None:
    """Both go on from one adapter; bf16 rounds in another order."""
    write_talks(home)
    losses(home, "start", model_name_or_path=whole, max_steps=1)
    common = {"adapter_name_or_path": home / "start"}
    plain = losses(home, "plain", model_name_or_path=whole, **common)
    packed = losses(home, "packed", **common, **changes)
    assert packed == pytest.approx(plain, rel=2e-2)
    assert packed[-1] < packed[0]


@pytest.mark.parametrize("kind", list(packed_checkpoints.STORED))
def test_a_packed_checkpoint(tmp_path: Path, kind: str) -> None:
    for module in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    folder, whole = packed_checkpoints.write(tmp_path, kind)
    alike(tmp_path, whole, model_name_or_path=folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(tmp_path: Path, bits: int) -> None:
    if importlib.util.find_spec("hqq") is None:
        pytest.skip("hqq is not installed")
    _, whole = packed_checkpoints.write(tmp_path, "gptq")
    stored = tmp_path / "hqq"
    args = ModelArguments(
        model_name_or_path=str(whole), quantization_bit=bits, quantization_method="hqq"
    )
    config = load.load_config(args, 128)
    how = load.quantization_config(args, torch.bfloat16)
    model = load.load_model(args, config, torch.bfloat16, attention=hf.ATTENTION, quantization=how)
    stored.mkdir()
    for file in whole.iterdir():
        (stored / file.name).write_bytes(file.read_bytes())
    weights = load_file(whole / "model.safetensors")
    found = [n for n, m in model.named_modules() if type(m).__name__ == "HQQLinear"]
    for name in found:
        whole_weight = model.get_submodule(name).dequantize()
        assert whole_weight.is_cuda
        weights[f"{name}.weight"] = whole_weight.cpu().contiguous()
    assert len(found) == 14
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    changes = {"quantization_bit": bits, "quantization_method": "hqq"}
    alike(tmp_path, stored, model_name_or_path=whole, **changes)
