"""Liger's kernels are asked for without its losses."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from longfactory.errors import UserError
from longfactory.model.liger import apply_liger

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def model_of(kind: str) -> Any:
    return types.SimpleNamespace(config=types.SimpleNamespace(model_type=kind))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def llama(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        model: Any = None,
    ) -> None:
        made.append(
            {
                "rope": rope,
                "cross_entropy": cross_entropy,
                "fused_linear_cross_entropy": fused_linear_cross_entropy,
                "model": model,
            }
        )

    def norms(rms_norm: bool = True, model: Any = None) -> None:
        made.append({"rms_norm": rms_norm, "model": model})

    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": llama, "other": norms}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    return made


def test_kernels_without_losses(calls: list[dict[str, Any]]) -> None:
    model = model_of("llama")
    apply_liger(model, GPU)
    assert calls == [
        {"rope": True, "cross_entropy": False, "fused_linear_cross_entropy": False, "model": model}
    ]


def test_an_architecture_without_a_loss_of_its_own(calls: list[dict[str, Any]]) -> None:
    apply_liger(model_of("other"), GPU)
    assert calls[0]["rms_norm"] is True


def test_refused(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no kernels for gpt_neo"):
        apply_liger(model_of("gpt_neo"), GPU)
    with pytest.raises(UserError, match="need a GPU, and this run is on the CPU"):
        apply_liger(model_of("llama"), CPU)
    assert calls == []
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(UserError, match="longfactory\\[liger\\]"):
        apply_liger(model_of("llama"), GPU)
