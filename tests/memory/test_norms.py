"""Norms in one kernel against transformers' own, and which models get them."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longfactory.memory import norms
from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory_dev.tiny_models import tiny_model

WIDTH = 24
CLASSES: dict[str, dict[str, Any]] = {
    "qwen3_5.Qwen3_5RMSNorm": {},
    "qwen3_5.Qwen3_5RMSNormGated": {},
    "kimi_linear.KimiLinearRMSNormGated": {},
    "nemotron_h.NemotronHRMSNorm": {},
    "granitemoehybrid.GraniteMoeHybridRMSNorm": {},
    "zamba2.Zamba2RMSNormGated": {"group_size": 8},
    "falcon_h1.FalconH1RMSNormGated": {"n_groups": 3},
    "falcon_h1.FalconH1RMSNormGated, gate first": {"n_groups": 3, "norm_before_gate": False},
}


def made(name: str) -> nn.Module:
    family, _, kind = name.partition(",")[0].partition(".")
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm: nn.Module = getattr(code, kind)(WIDTH, eps=1e-3, **CLASSES[name])
    nn.init.normal_(norm.weight)
    return norm


def graded(norm: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = norm(*leaves)
    slope = torch.sin(torch.arange(out.numel())).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, norm.weight], slope)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_norms_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = made(name)
    gated = "Gated" in name
    inputs = [torch.randn(1, 40, WIDTH).to(dtype) for _ in range(1 + gated)]
    own = graded(norm, inputs)
    assert norms.install(norm) == 1
    found = graded(norm, inputs)
    for mine, theirs in zip(found, own, strict=True):
        assert mine.dtype == theirs.dtype
        far = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert far < (2e-6 if dtype == torch.float32 else 6e-3)


def test_norms_store_their_inputs_alone() -> None:
    norm = made("qwen3_5.Qwen3_5RMSNormGated")
    norms.install(norm)
    stored: list[Tensor] = []
    x, gate = torch.randn(2, 1, 8, WIDTH, dtype=torch.bfloat16).unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        norm(x.requires_grad_(), gate)
    assert sum(t.nbytes for t in stored) == 2 * x.nbytes + norm.weight.nbytes


class ScaledRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def test_norms_of_another_kind_stay() -> None:
    assert norms.install(ScaledRMSNorm()) == 0
    assert norms.install(nn.LayerNorm(WIDTH)) == 0


@pytest.mark.parametrize(("family", "some"), [("qwen3_5_text", True), ("llama", False)])
@pytest.mark.parametrize("checkpoint", ["none", "full"])
def test_norms_of_models_with_recurrent_layers(family: str, some: bool, checkpoint: str) -> None:
    model = tiny_model(family)
    apply_memory(model, MemorySettings(checkpoint=checkpoint))
    found = [m for m in model.modules() if norms.is_fused(m)]
    every = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    assert len(found) == (len(every) if some else 0)
