"""For what elementwise functions are compiled (forms of arguments, not lengths), and that a wrong
kernel is seen at its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_calls import calls
from longfactory.memory import compiled, layer_ops
from longfactory.model import logit_ops
from longfactory.sp import probe


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the copies that were handed to the compiler."""
    names: list[str] = []

    def compile(fn: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
        names.append(fn.__code__.co_name)
        assert (dynamic is None) == names[-1].endswith("_any")
        return fn

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compiled, "compiles", lambda x: True)
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "_failed", set())
    monkeypatch.setattr(compiled, "_lengths_vary", False)
    return names


def normed(*shape: int) -> None:
    x, weight = torch.randn(*shape), torch.randn(shape[-1])
    found = layer_ops.norm(x, weight, 1e-6)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, shape[-1:], weight, 1e-6))


def test_copies_for_each_width_and_for_lengths_that_come_often(
    copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a guard's short row comes between, for which nothing is compiled."""
    monkeypatch.setattr(compiled, "OFTEN", 3)
    for shape in ((12, 8), (20, 8), (12, 8), (12, 3, 8), (12, 6)):
        normed(*shape)
    assert copies == ["norm_0_0", "norm_0_1", "norm_1_0", "norm_2_0"]
    with probe.proof():
        normed(5, 8)
    layer_ops.norm(torch.randn(4, 8), torch.randn(8), 1e-5)  # another number
    assert copies[4:] == ["norm_3_0"]
    copies.clear()
    for length in (9, 12, 10, 9, 9, 9, 9, 11, 9, 20):
        normed(length, 8)
    assert copies == ["norm_0_any"]
    normed(9, 8)
    assert copies == ["norm_0_any", "norm_0_2"]


def test_a_length_that_comes_in_every_layer_of_one_row_has_not_come_often(
    copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has for long."""
    monkeypatch.setattr(compiled, "IN_A_ROW", 200)
    for length in (12, 20, 9):
        for _ in range(150):
            normed(length, 8)
    assert copies == ["norm_0_0", "norm_0_1", "norm_0_any"]
    for _ in range(51):
        normed(9, 8)
    assert copies[3:] == ["norm_0_2"]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4, 4, 4, 3], ["norm_0_0", "norm_0_1"]),
        ([1, 2, 3, 4, 4], ["norm_0_any"]),
        ([], ["norm_0_0", "norm_0_1"]),
    ],
)
def test_rows_of_many_lengths_are_served_by_one_copy(
    copies: list[str], lengths: list[int], expected: list[str]
) -> None:
    compiled.expect(lengths)
    for length in (12, 20, 12):
        normed(length, 8)
    assert copies == expected


@pytest.mark.slow
def test_what_serves_all_lengths_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler itself (half a minute)."""
    from torch._dynamo.callback import callback_handler

    monkeypatch.setattr(compiled, "compiles", lambda x: True)
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "_lengths_vary", True)
    count = 0

    def begins(_: Any) -> None:
        nonlocal count
        count += 1

    callback_handler.register_start_callback(begins)
    try:
        for tokens in (100, 130, 77, 500):
            x, weight = torch.randn(tokens, 24), torch.randn(24)
            layer_ops.norm(x, weight, 1e-6)
            layer_ops.norm_backward(x, x, weight, 1e-6)
            layer_ops.gated(x, x)
            assert count == 3, tokens
    finally:
        callback_handler.remove_start_callback(begins)
    assert not compiled._failed


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[torch.Size]]]:
    """What torch's compiler makes of functions, up to the graph: a copy's name and the sizes of its
    tensors.
    """
    made: list[tuple[str, list[torch.Size]]] = []
    monkeypatch.setattr(compiled, "compiles", lambda x: True)
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "_lengths_vary", True)
    compile_with = torch.compile

    def compile(fn: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            values = [node.meta.get("example_value") for node in graph.graph.nodes]
            shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
            made.append((fn.__code__.co_name, shapes))
            return graph.forward

        return compile_with(fn, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", compile)
    return made


def test_a_tensor_that_comes_again_is_of_one_length_for_its_own_copy(
    graphs: list[tuple[str, list[torch.Size]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy for all lengths has seen it before."""
    monkeypatch.setattr(compiled, "IN_A_ROW", 2)
    x, (cos, sin) = torch.randn(100, 2, 8), torch.randn(2, 100, 4)
    for _ in range(3):
        layer_ops.rotate(x, cos, sin)
    assert not compiled._failed
    assert [name for name, _ in graphs] == ["rotate_0_any", "rotate_0_0"]
    varies = {name: not all(type(n) is int for n in sum(found, ())) for name, found in graphs}
    assert varies == {"rotate_0_any": True, "rotate_0_0": False}


@pytest.mark.parametrize("graded", [False, True])
def test_trained_tensors_are_compiled_for_once_and_have_gradients(
    graphs: list[tuple[str, list[torch.Size]]], graded: bool
) -> None:
    """As functions of autograd see them: their inputs require gradients while none are recorded."""
    with torch.set_grad_enabled(graded):
        for tokens in (100, 100, 120, 77):
            x, (cos, sin) = torch.randn(tokens, 2, 8), torch.randn(2, tokens, 4)
            assert layer_ops.rotate(x.requires_grad_(), cos, sin).requires_grad == graded
    assert not compiled._failed
    assert [name for name, _ in graphs] == ["rotate_0_any"]


def test_weights_of_many_sizes_share_what_is_compiled(
    graphs: list[tuple[str, list[torch.Size]]],
) -> None:
    """DoRA takes the norms of each linear's rows."""
    for outputs in (24, 40, 16, 56):
        weight = torch.nn.Parameter(torch.randn(outputs, 8))
        layer_ops.row_norms(weight, torch.randn(outputs, 8), 0.5)
    assert not compiled._failed
    assert [name for name, _ in graphs] == ["_row_norms_0_any"]


def test_many_forms_share_one(copies: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "FORMS", 2)
    for width in (4, 5, 6, 7, 4, 6):
        normed(3, width)
    assert copies == ["norm_0_0", "norm_1_0", "norm_2_any"]


def test_what_cannot_be_compiled_runs_as_it_is(
    copies: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(fn: Callable[..., Any], dynamic: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            raise ValueError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    normed(12, 8)
    normed(12, 6)
    assert [r.getMessage() for r in caplog.records] == ["norm runs uncompiled: no compiler"]


@pytest.mark.parametrize("name", calls("cpu"))
def test_a_wrong_kernel_is_seen_at_its_first_call(
    name: str,
    copies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of each function, in each of its results: in rows everywhere, of sums in all."""
    torch.manual_seed(0)
    call = calls("cpu")[name]
    monkeypatch.setattr(compiled, "PART", 1000)  # sums in several parts
    right = call()
    count = len(copies)
    assert count == 1 and caplog.text == ""
    call()
    assert len(copies) == 1
    results = right if isinstance(right, tuple) else (right,)
    for place, result in enumerate(results):
        if result is None:
            continue

        def wrong(fn: Callable[..., Any], dynamic: Any, place: int = place) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                found = fn(*arguments)
                every = list(found) if isinstance(found, tuple) else [found]
                every[place] = every[place] * 1.05
                return tuple(every) if isinstance(found, tuple) else every[0]

            return run

        monkeypatch.setattr(torch, "compile", wrong)
        compiled._compiled.clear()
        caplog.clear()
        again = call()
        again = again if isinstance(again, tuple) else (again,)
        assert "compiled it is" in caplog.text and "times as far off" in caplog.text, place
        torch.testing.assert_close(again[place], result)
        compiled._failed.clear()


def test_a_wrong_kernel_that_writes_over_its_argument_ends_the_run(
    copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, lse = torch.randn(100, 200), torch.full((100,), 6.0)
    before = z.clone()
    found = logit_ops._softmax_gradient(z, lse, lse, 1.0, None)
    torch.testing.assert_close(found, -(before - 6).exp() * 6)
    assert found is z
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: lambda z, *others: z.mul_(2.0))
    compiled._compiled.clear()
    with pytest.raises(RuntimeError, match="times as far off as tolerated, and it has overwritten"):
        logit_ops._softmax_gradient(before, lse, lse, 1.0, None)


def test_a_kernel_that_gives_no_numbers_is_seen(
    copies: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: lambda *a: fn(*a).fill_(float("nan")))
    normed(100, 8)
    assert "norm runs uncompiled" in caplog.text


def test_no_tokens_and_numbers_that_are_no_numbers_themselves(
    copies: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    normed(0, 8)
    x = torch.randn(100, 8)
    x[::2] = float("inf")
    layer_ops.norm(x, torch.randn(8), 1e-6)
    assert caplog.text == ""
