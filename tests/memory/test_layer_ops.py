"""For what the layers' elementwise functions are compiled: forms of arguments, not lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longfactory.memory import layer_ops
from longfactory.sp.probe import probe


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the copies that were handed to the compiler."""
    names: list[str] = []

    def compile(fn: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
        names.append(fn.__code__.co_name)
        assert (dynamic is None) == names[-1].endswith("_any")
        return fn

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(layer_ops, "compiles", lambda x: True)
    monkeypatch.setattr(layer_ops, "_compiled", {})
    return names


def normed(*shape: int) -> None:
    x, weight = torch.randn(*shape), torch.randn(shape[-1])
    found = layer_ops.norm(x, weight, 1e-6)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, shape[-1:], weight, 1e-6))


def test_copies_for_each_width_and_for_lengths_that_come_often(
    copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a guard's short row comes between, which has copies of its own."""
    monkeypatch.setattr(layer_ops, "OFTEN", 3)
    for shape in ((12, 8), (20, 8), (12, 8), (12, 3, 8), (12, 6)):
        normed(*shape)
    assert copies == ["norm_0_0", "norm_0_1", "norm_1_0", "norm_2_0"]
    with probe(installed=True):
        normed(5, 8)
    layer_ops.norm(torch.randn(4, 8), torch.randn(8), 1e-5)  # another number
    assert copies[4:] == ["norm_in_guard_0_0", "norm_3_0"]
    copies.clear()
    for length in (9, 12, 10, 9, 9, 11, 20):
        normed(length, 8)
    assert copies == ["norm_0_any"]
    normed(9, 8)
    normed(9, 8)
    assert copies == ["norm_0_any", "norm_0_2"]


def test_many_forms_share_one(copies: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_ops, "FORMS", 2)
    for width in (4, 5, 6, 7, 4, 6):
        normed(3, width)
    assert copies == ["norm_0_0", "norm_1_0", "norm_2_any"]


def test_what_cannot_be_compiled_runs_as_it_is(
    copies: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layer_ops, "_failed", set())

    def fails(fn: Callable[..., Any], dynamic: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            raise ValueError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    normed(12, 8)
    normed(12, 6)
    assert [r.getMessage() for r in caplog.records] == ["norm runs uncompiled: no compiler"]
