"""Routed experts in four bits compute with the numbers that these stand for, forward and backward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longfactory.config.arguments import FinetuningArguments, ModelArguments
from longfactory.model import experts, load
from longfactory.model.adapters import apply_finetuning, load_adapter
from longfactory.model.trained_parameters import count_parameters
from longfactory.sp import hf
from longfactory_dev.tiny_models import tiny_model

pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'longfactory[quantization]'"
)
IDS = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))


def quantised(folder: Path, bits: int | None = 4) -> Any:
    args = ModelArguments(model_name_or_path=str(folder), quantization_bit=bits)
    return load.load_model(
        args,
        load.load_config(args, 128),
        torch.float32,
        attention="eager",
        quantization=load.quantization_config(args, torch.float32),
    )


def made_whole(four: nn.Module, plain: Any) -> Any:
    """The model whose ordinary weights are those that four bits stand for."""
    changed = 0
    with torch.no_grad():
        for name, p in four.named_parameters():
            if hasattr(p, "quant_state"):
                target = plain.get_parameter(name)
                changed += "experts" in name and bool((target != experts.dequantised(p)).any())
                target.copy_(experts.dequantised(p))
    assert changed > 0
    return plain


def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), **found}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in b.items():
        assert float((a[name] - x).abs().max()) <= 2e-5 * float(x.abs().max()), name


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "glm4_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt_oss",))],
)
def test_four_bits_compute_with_what_they_stand_for(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, torch.float32)
    base.save_pretrained(tmp_path / "base")
    four = quantised(tmp_path / "base")
    packed = [n for n, p in four.named_parameters() if hasattr(p, "quant_state")]
    assert sum("experts.gate_up_proj" in n for n in packed) == (3 if family == "glm4_moe" else 4)
    assert count_parameters(four)[1] == count_parameters(base)[1]
    whole = made_whole(four, copy.deepcopy(base))
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        assert_equal({"logits": four(input_ids=IDS).logits}, {"logits": expected})

    method = FinetuningArguments(finetuning_type="lora", lora_rank=3)
    models = []
    for model in (whole, four):
        model = apply_finetuning(model, method, ModelArguments())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        models.append(model)
    assert_equal(outputs(models[1]), outputs(models[0]))
    # the reference of a preference loss: the adapter off
    with models[1].disable_adapter(), torch.no_grad():
        assert_equal({"logits": models[1](input_ids=IDS).logits}, {"logits": expected})

    # the adapter is an ordinary one, and goes on from its file
    models[1].save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    plain = PeftModel.from_pretrained(
        made_whole(quantised(tmp_path / "base"), base), str(tmp_path / "adapter")
    )
    again = load_adapter(quantised(tmp_path / "base"), str(tmp_path / "adapter"))
    for model in (plain, again):
        with torch.no_grad():
            logits = model.eval()(input_ids=IDS).logits
        assert_equal({"logits": logits}, {"logits": outputs(models[0])["logits"]})


def test_the_bytes_are_told(tmp_path: Path) -> None:
    base = tiny_model("qwen3_moe", torch.float32, moe_intermediate_size=64)
    base.save_pretrained(tmp_path)
    line = load.describe_quantised(quantised(tmp_path))
    four = sum(p.numel() for n, p in base.named_parameters() if "experts" in n or "_proj" in n)
    rest = sum(p.numel() for p in base.parameters()) - four
    assert line.startswith(f"Quantised: {four:,} parameters; {rest:,} in float32;")
    assert "not quantised" not in line
    assert hf.ATTENTION  # the engine's attention is another test's
