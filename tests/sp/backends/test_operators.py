"""PyTorch's private operators of attention are those that the engine calls, or they are refused."""

from __future__ import annotations

import pytest
import torch

from kinds_of_tiles import TILES
from longfactory.sp import backends
from longfactory.sp.backends import operators

CHANGED = {
    "an argument is gone": ("Tensor out, ", "", "has no 'Tensor out'"),
    "an argument may be absent": ("Tensor out", "Tensor? out", "has no 'Tensor out'"),
    "a new one is needed": ("*, ", "int tail, *, ", "also needs 'int tail'"),
    "another order": (
        "Tensor query, Tensor key",
        "Tensor key, Tensor query",
        "in the order Tensor grad_out",
    ),
    "fewer results": ("(Tensor grad_query, ", "(", r"gives \(Tensor, Tensor\), expected"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_an_operator_whose_backward_changed_is_refused_before_its_forward(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    operator = "_scaled_dot_product_flash_attention_for_cpu"
    before, after, expected = CHANGED[change]
    found = operators.schema(f"{operator}_backward")
    assert found is not None and before in found
    changed = {f"{operator}_backward": found.replace(before, after)}
    plain = operators.schema
    monkeypatch.setattr(operators, "schema", lambda name: changed.get(name, plain(name)))
    operators._found.cache_clear()
    backends.forget_choices()
    x = torch.zeros(2, 1, 8)
    sentence = f"the operator {operator}_backward of PyTorch .* than expected: .*{expected}"
    with pytest.raises(RuntimeError, match=sentence):
        backends.cpu.forward(x, x, x, TILES["full"], 1.0, None)
    # and the run goes on with another kernel, or is refused where its file names this one
    assert backends.select("auto", TILES["full"], x, x, None) is backends.math
    with pytest.raises(ValueError, match="attention_backend: cpu fails its self-test"):
        backends.select("cpu", TILES["full"], x, x, None)
    monkeypatch.undo()
    operators._found.cache_clear()
    backends.forget_choices()


def test_an_operator_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (operators.Signature("Tensor query", "Tensor"),) * 2
    monkeypatch.setitem(operators.OPERATORS, "_no_such_attention", both)
    with pytest.raises(RuntimeError, match="has no operator _no_such_attention_forward"):
        operators.forward("_no_such_attention", query=torch.zeros(1))


def test_an_argument_added_behind_the_known_ones_is_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "_flash_attention_forward"
    found = operators.schema(name)
    assert found is not None
    changed = found.replace(") -> (", ", bool new=False) -> (")
    monkeypatch.setattr(operators, "schema", lambda name: changed)
    assert operators.difference(name, operators.OPERATORS["_flash_attention"][0]) is None


@pytest.mark.parametrize("operator", operators.OPERATORS)
def test_private_operators_have_the_known_schema(operator: str) -> None:
    """A failure here means: read the operator's new contract before trusting it."""
    for name, expected in zip(
        operators.names(operator), operators.OPERATORS[operator], strict=True
    ):
        assert operators.difference(name, expected) is None
