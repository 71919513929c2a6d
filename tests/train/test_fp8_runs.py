"""`fp8: true` (torchao; on a CPU its arithmetic is emulated): what a token computes does not depend
on which tokens lie beside it, so two processes that share each row train what one trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longfactory.config import ConfigError, from_mapping
from longfactory.errors import UserError
from longfactory.model import fp8
from longfactory.testing import tiny_model
from small_runs import LORA, home, steps, train

pytestmark = pytest.mark.processes

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'longfactory[fp8]'")

__all__ = ["home"]  # a fixture


def layer(width: int, out: int) -> nn.Module:
    """A linear layer of eight bits, as runs have it."""
    model = tiny_model("llama", seed=0, hidden_size=width, intermediate_size=out)
    fp8.install(model, torch.device("cpu"))
    found: nn.Module = model.model.layers[0].mlp.up_proj
    assert type(found).__name__ == "Float8Linear"
    return found


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    linear = layer(64, 128)
    torch.manual_seed(0)
    # of very different sizes: one scale for all would round the small ones to nothing
    x = torch.randn(48, 64) * torch.logspace(-3, 3, 48)[:, None]
    upstream = torch.randn(48, 128)

    def computed(parts: list[slice]) -> list[torch.Tensor]:
        linear.zero_grad()
        outputs, gradients = [], []
        for part in parts:
            inputs = x[part].clone().requires_grad_()
            out = linear(inputs)
            out.backward(upstream[part])
            outputs.append(out.detach())
            assert inputs.grad is not None
            gradients.append(inputs.grad)
        weight: torch.Tensor = linear.weight.grad  # type: ignore[assignment]
        return [torch.cat(outputs), torch.cat(gradients), weight.clone()]

    whole = computed([slice(0, 48)])
    shared = computed([slice(0, 5), slice(40, 48), slice(5, 40)])
    order = [*range(5), *range(40, 48), *range(5, 40)]
    assert torch.equal(whole[0][order], shared[0]) and torch.equal(whole[1][order], shared[1])
    assert torch.dist(whole[2], shared[2]) < 1e-6 * whole[2].norm()
    # and it is arithmetic of eight bits: three of them are a mantissa
    exact = x @ linear.weight.T
    error = (whole[0] - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.min() > 1e-3 and error.max() < 0.1


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_two_processes_train_what_one_trains(home: Path, changes: dict[str, Any]) -> None:
    given = {**changes, "fp8": True, "bf16": True}
    # Folders of their own: an adapter is not written beside a full model.
    kind = changes.get("finetuning_type", "full")
    one, two = (steps(train(home, f"fp8_{kind}_{n}", n, **given)) for n in (1, 2))
    plain = steps(train(home, f"bf16_{kind}", 1, **{**changes, "bf16": True}))
    assert one[0]["loss"] != plain[0]["loss"]
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=2e-2), key
        assert [h[key] for h in one] == pytest.approx([h[key] for h in plain], rel=0.2), key


def test_routers_heads_and_odd_widths_stay() -> None:
    model = tiny_model("qwen3_moe", seed=0)
    fp8.install(model, torch.device("cpu"))
    names = [n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"]
    assert names and all(".self_attn." in n for n in names)
    odd = tiny_model("llama", seed=0, hidden_size=24, intermediate_size=40)
    with pytest.raises(UserError, match="no linear layer whose widths are multiples of 16"):
        fp8.install(odd, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Set bf16: true or pure_bf16: true"),
        ({"bf16": True, "quantization_bit": 4, "finetuning_type": "lora"}, "two formats"),
        ({"bf16": True, "fp8_backend": "te"}, "Transformer Engine replaces whole layers"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    base = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "fp8": True}
    with pytest.raises(ConfigError, match=message):
        from_mapping({**base, **changes})
