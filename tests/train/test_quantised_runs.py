"""LoRA on weights of 4 and 8 bits (bitsandbytes, on the CPU): what two processes that share the
sequences save is what one saves.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory.sp.layout import Segment
from longfactory.testing import tiny_model
from memory_models import run
from small_runs import LORA, STEPS, home, steps, train, write_tokenizer

pytestmark = pytest.mark.processes

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'longfactory[quantization]'"
)

__all__ = ["home"]  # a fixture

# name -> keys, largest relative difference of losses and norms: bf16 rounds sums that are made in
# another order.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "4 bits": ({"quantization_bit": 4}, 5e-5),
    "4 bits, fp4, constants of 32 bits": (
        {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
        5e-5,
    ),
    "4 bits, bf16": ({"quantization_bit": 4, "bf16": True}, 2e-2),
    "4 bits, asft": ({"quantization_bit": 4, "use_asft_loss": True, "learning_rate": 0.1}, 5e-5),
    "4 bits, oft": (
        {
            "quantization_bit": 4,
            "finetuning_type": "oft",
            "oft_block_size": 8,
            **dict.fromkeys(("lora_target", "lora_rank")),
        },
        5e-5,
    ),
    "8 bits": ({"quantization_bit": 8}, 2e-3),
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_train_what_one_trains(home: Path, kind: str, mode: str) -> None:
    changes, tolerance = KINDS[kind]
    changes = {**LORA, "sequence_parallel_mode": mode, **changes}
    one, two = (steps(train(home, f"{kind}_{mode}_{n}", n, **changes)) for n in (1, 2))
    assert len(one) == STEPS and one[-1]["loss"] != one[0]["loss"]
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=tolerance), key
    a, b = (adapter(home / f"{kind}_{mode}_{n}") for n in (1, 2))
    part = "oft_R" if "oft" in kind else "lora_B"
    assert a.keys() == b.keys() and sum(part in n for n in a) == 14
    for name, x in a.items():
        assert (b[name] - x).norm() <= 5 * tolerance * x.norm(), name


def dequantised(model: Path, folder: Path) -> Path:
    """The model whose ordinary weights are those that four bits stand for."""
    from longfactory.model import load
    from longfactory.sp import hf

    given: dict[str, Any] = {
        "model_name_or_path": str(model),
        "train_from_scratch": False,
        "trust_remote_code": False,
    }
    given |= {"attention_dropout": None, "rope_scaling": None}
    given |= {
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "double_quantization": True,
        "quantization_type": "nf4",
    }
    args = SimpleNamespace(**given)
    config = load.load_config(args, 128)
    quantised = load.load_model(
        args,
        config,
        torch.float32,
        attention=hf.ATTENTION,
        quantization=load.quantization_config(args, torch.float32),
    )
    plain = tiny_model("llama", vocab_size=config.vocab_size)
    changed = 0
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                )
                target = plain.get_submodule(name).weight
                changed += int((target - weight).abs().max() > 1e-3)
                target.copy_(weight)
    assert changed == 14
    plain.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("size", [1, 2])
def test_four_bits_train_like_the_weights_that_they_stand_for(home: Path, size: int) -> None:
    """Plain LoRA on those weights is the specification. Both go on from one adapter: each draws
    other random numbers for its own.
    """
    whole = dequantised(home / "model", home / f"dequantised{size}")
    train(home, f"start{size}", 1, **LORA, model_name_or_path=whole, max_steps=1)
    changes = {**LORA, "adapter_name_or_path": home / f"start{size}"}
    plain = steps(train(home, f"plain{size}", 1, **changes, model_name_or_path=whole))
    four = steps(train(home, f"four{size}", size, **changes, quantization_bit=4))
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in four] == pytest.approx([h[key] for h in plain], rel=1e-4), key
    a, b = adapter(home / f"plain{size}"), adapter(home / f"four{size}")
    for name, x in a.items():
        torch.testing.assert_close(
            b[name], x, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt_oss",))]
)
def test_experts_in_four_bits(home: Path, family: str) -> None:
    """Every linear map of the layers in four bits and with an adapter, experts included."""
    from longfactory_dev.tiny_models import tiny_model as of_family

    folder = home / family
    vocabulary = write_tokenizer(folder)
    of_family(family, torch.float32, vocab_size=vocabulary).save_pretrained(folder)
    changes = {**LORA, "quantization_bit": 4, "model_name_or_path": folder}
    one, two = (steps(train(home, f"{family}{n}", n, **changes)) for n in (1, 2))
    assert len(one) == STEPS and one[-1]["loss"] < one[0]["loss"]
    for key in ("loss", "grad_norm", "expert_max_load"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=5e-5), key
    a, b = (adapter(home / f"{family}{n}") for n in (1, 2))
    assert a.keys() == b.keys() and sum("experts" in n and "lora_B" in n for n in a) == 2 * 4
    for name, x in a.items():
        assert (b[name] - x).norm() <= 3e-4 * x.norm(), name


@pytest.mark.parametrize("double", [True, False])
def test_the_hand_written_layer_computes_with_four_bits(home: Path, double: bool) -> None:
    """Gradients of one row equal those of the layer as PEFT and bitsandbytes compute it."""
    from longfactory.memory.decoder_layer import _Layer

    def gradients(layer: str) -> tuple[float, dict[str, torch.Tensor]]:
        model = four_bit_lora(home / "model", double)
        apply_memory(model, MemorySettings(layer=layer, mlp_chunk=9, keep_attention=1.0))
        loss = run(model, length=40, segments=(Segment(0, 25), Segment(25, 40)))
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return float(loss), found

    calls: list[int] = []
    backward = _Layer.backward
    with mock.patch.object(
        _Layer, "backward", staticmethod(lambda c, g: calls.append(1) or backward(c, g))
    ):
        loss, wanted = gradients("generic")
        assert not calls
        again, found = gradients("auto")
    assert len(calls) == 2
    assert again == pytest.approx(loss, rel=1e-6)
    for name, g in wanted.items():
        torch.testing.assert_close(
            found[name], g, rtol=2e-4, atol=1e-6, msg=lambda m, n=name: n + m
        )


def four_bit_lora(folder: Path, double: bool) -> Any:
    """A model of four bits with LoRA on all linears, B not zero, prepared for the engine."""
    from peft import LoraConfig, get_peft_model

    from longfactory.config.arguments import ModelArguments
    from longfactory.model import load
    from longfactory.sp import SequenceParallel, hf

    args = ModelArguments(
        model_name_or_path=str(folder), quantization_bit=4, double_quantization=double
    )
    config = load.load_config(args, 128)
    quantization = load.quantization_config(args, torch.float32)
    model = load.load_model(
        args, config, torch.float32, attention=hf.ATTENTION, quantization=quantization
    )
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    hf.prepare(model, SequenceParallel.create(1))
    return model.train()
