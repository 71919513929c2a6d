"""LoRA on checkpoints that are GPTQ or AWQ, and on weights that hqq quantises while loading: what
plain LoRA trains on the ordinary weights that they stand for, on one process and on two.

A package that is not installed is skipped: the extras `gptq` and `hqq` have them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import packed_checkpoints
from longfactory.errors import UserError
from longfactory.model import load, trained_parameters
from longfactory.testing import tiny_model
from small_runs import LORA, STEPS, home, steps, train, write_tokenizer

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture


@pytest.fixture(scope="module", autouse=True)
def _uncompiled() -> Iterator[None]:
    """GPTQModel compiles the reading of each layer, which takes minutes on a CPU."""
    with mock.patch.dict(os.environ, {"TORCH_COMPILE_DISABLE": "1"}):
        yield


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def trains_alike(
    home: Path, name: str, whole: Path, changes: dict[str, Any], tolerance: float
) -> None:
    """Runs of one and of two processes train what plain LoRA trains on the folder `whole`. All go
    on from one adapter: each would draw other random numbers for its own.

    Args:
        tolerance: of the change of the adapter, between one process and two.
    """
    train(home, f"{name} start", 1, **LORA, model_name_or_path=whole, max_steps=1)
    common = {**LORA, "adapter_name_or_path": home / f"{name} start"}
    plain = steps(train(home, f"{name} plain", 1, **common, model_name_or_path=whole))
    assert len(plain) == STEPS and plain[-1]["loss"] != plain[0]["loss"]
    begun, meant = adapter(home / f"{name} start"), adapter(home / f"{name} plain")

    def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(a[n] - b[n]).flatten() for n in meant]).norm())

    after: list[dict[str, torch.Tensor]] = []
    for size in (1, 2):
        found = steps(train(home, f"{name} {size}", size, **common, **changes))
        for key in ("loss", "grad_norm"):
            wanted = pytest.approx([h[key] for h in plain], rel=tolerance)
            assert [h[key] for h in found] == wanted, (size, key)
        after.append(adapter(home / f"{name} {size}"))
        assert far(after[-1], meant) <= 10 * tolerance * far(meant, begun)
    between = far(*after) / far(meant, begun)
    print(f"{name}: {between:.1e} between one process and two")
    assert between <= tolerance


@pytest.mark.parametrize("kind", list(packed_checkpoints.STORED))
def test_a_packed_checkpoint_trains_as_what_it_stands_for(home: Path, kind: str) -> None:
    needs("gptqmodel", "optimum")
    folder, whole = packed_checkpoints.write(home, kind)
    # AWQ's layer multiplies in 16 bits, in a run of float32 too
    tolerance = 5e-4 if kind == "awq" else 1e-4
    trains_alike(home, kind, whole, {"model_name_or_path": folder}, tolerance)


def hqq_model(home: Path, bits: int) -> tuple[Any, Path]:
    """A model that hqq has quantised, and a folder of the weights that it stands for."""
    from longfactory.config.arguments import ModelArguments
    from longfactory.sp import hf

    folder, whole = home / f"hqq{bits}", home / f"hqq{bits} whole"
    for place in (folder, whole):
        size = write_tokenizer(place)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    plain = tiny_model("llama", seed=0, vocab_size=size, tie_word_embeddings=False, **sizes)
    plain.save_pretrained(folder)
    plain.save_pretrained(whole)
    args = ModelArguments(
        model_name_or_path=str(folder), quantization_bit=bits, quantization_method="hqq"
    )
    config = load.load_config(args, 128)
    quantization = load.quantization_config(args, torch.float32)
    model = load.load_model(
        args, config, torch.float32, attention=hf.ATTENTION, quantization=quantization
    )
    weights = load_file(whole / "model.safetensors")
    changed = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "HQQLinear":
            meant = module.dequantize()
            changed += int((weights[f"{name}.weight"] - meant).abs().max() > 1e-4)
            weights[f"{name}.weight"] = meant.contiguous()
    assert changed == 14
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    return model, whole


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=names))


@pytest.mark.parametrize("bits", [4, 3, 8])
def test_hqq_trains_as_the_weights_that_it_makes(home: Path, bits: int) -> None:
    needs("hqq")
    model, whole = hqq_model(home, bits)
    assert "in all" in (line := load.describe_quantised(model))
    numbers = sum(
        w.numel() for n, w in load_file(whole / "model.safetensors").items() if "proj" in n
    )
    assert f"Quantised: {numbers:,} parameters" in line
    lines = "".join(line for _, line in trained_parameters.describe_trained(with_adapters(model)))
    assert f"on {numbers:,} of the model's" in lines and "W_q" not in lines
    changes = {"quantization_bit": bits, "quantization_method": "hqq"}
    folder = home / f"hqq{bits}"
    trains_alike(home, f"hqq{bits}", whole, {**changes, "model_name_or_path": folder}, 1e-4)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    hidden = {"hqq", "gptqmodel", "optimum"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda m, *a: None if m in hidden else find(m, *a)
    )
    yield


def test_a_missing_package_is_a_sentence(without: None, tmp_path: Path) -> None:
    from longfactory.config.arguments import ModelArguments
    from longfactory.sp import hf

    args = ModelArguments(model_name_or_path="m", quantization_bit=4, quantization_method="hqq")
    with pytest.raises(UserError, match=r'needs hqq. Run: pip install "longfactory\[hqq\]"'):
        load.quantization_config(args, torch.float32)
    for kind in packed_checkpoints.STORED:
        folder, _ = packed_checkpoints.write(tmp_path, kind)
        args = ModelArguments(model_name_or_path=str(folder))
        config = load.load_config(args, 128)
        with pytest.raises(UserError, match=r'pip install "longfactory\[gptq\]"'):
            load.load_model(args, config, torch.float32, attention=hf.ATTENTION)


@pytest.mark.parametrize("kind", list(packed_checkpoints.STORED))
def test_packed_weights_are_not_trained_whole(home: Path, kind: str) -> None:
    folder, _ = packed_checkpoints.write(home, kind)
    with pytest.raises(Exception, match=f"this checkpoint is quantised \\({kind}\\)"):
        train(home, f"{kind} full", 1, model_name_or_path=folder)
