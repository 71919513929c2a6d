"""What Triton computes of some heads, beside PyTorch."""

import itertools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longfactory.sp.recurrent import computed, convolution
from longfactory.sp.recurrent.fragments import Fragment, Fragments
from longfactory.sp.recurrent.rule import CHUNK, Rule


def test_recurrent_heads_that_are_too_wide_for_the_kernels_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = types.SimpleNamespace(runs_on=lambda device: True)
    monkeypatch.setattr(computed, "_kernels", lambda: kernels)
    narrow, wide = torch.zeros(4, 1, 8), torch.zeros(4, 1, computed.WIDEST + 1)
    gates = torch.zeros(2, 4, 1).unbind()
    assert not computed.by_kernels([narrow, narrow, wide, *gates], Rule("delta", 1.0))
    assert "keys of 8 and values of 257 runs in PyTorch, slowly" in caplog.text


def test_recurrent_kernels_are_proved_as_the_run_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With values that are added to the outputs, and without: kernels of their own."""
    asked: list[bool] = []

    def results(*given: Any) -> list[torch.Tensor]:
        asked.append(given[-1] is not None)
        return [torch.ones(1)]

    monkeypatch.setattr(
        computed, "_kernels", lambda: types.SimpleNamespace(runs_on=lambda device: True)
    )
    monkeypatch.setattr(computed, "results", results)
    q, v = torch.zeros(4, 1, 8), torch.zeros(4, 1, 8)
    inputs = [q, q, v, *torch.zeros(2, 4, 1).unbind()]
    computed._are_right.cache_clear()
    for skip in (True, False):
        assert computed.by_kernels(inputs, Rule("plain", 1.0), skip)
    computed._are_right.cache_clear()
    assert asked == [True, True, False, False]


@pytest.mark.parametrize(
    ("dtype", "dims", "precision"),
    [
        (torch.bfloat16, (16, 1), "tf32"),
        (torch.float32, (16, 1), "ieee"),  # by tf32x3 gradients of q were 5e-1 from float64
        (torch.float32, (64, 100), "tf32x3"),
    ],
)
def test_recurrent_kernels_multiply_narrow_heads_without_tensor_cores_in_float32(
    dtype: torch.dtype, dims: tuple[int, int], precision: str
) -> None:
    assert computed.precision_of(dtype, *dims) == precision


SHAPES = {
    "delta": ("delta", 1, 2, 20, 20, False),
    "delta, a decay of each channel": ("delta", 1, 1, 20, 16, True),
    "plain": ("plain", 1, 2, 20, 16, False),
    "plain, a decay of each channel": ("plain", 1, 2, 16, 1, True),
}
"""Kind, key heads, heads, and dims of keys and values."""


@pytest.mark.parametrize("bias", [None, torch.zeros(16)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_kernels_of_a_convolution_are_proved_as_they_are_called(
    monkeypatch: pytest.MonkeyPatch, bias: Tensor | None, activation: str | None
) -> None:
    """Triton makes others without a bias, and without silu."""
    asked: list[tuple[bool, ...]] = []
    monkeypatch.setattr(convolution, "kernels_on", lambda x, width, *call: asked.append(call))
    fragments = Fragments((Fragment(0, 0, 30, 0, -1),), 0, 1, 30)
    convolution.convolution(torch.ones(30, 16), torch.ones(16, 4), bias, activation, fragments)
    assert asked == [(False, bias is not None, activation is not None)]


@pytest.mark.processes
def test_recurrent_kernels_are_the_formulas_where_they_are_interpreted() -> None:
    """Outputs, every gradient, and what fragments change. Triton looks at the environment when it is
    imported; with its versions before 3.8 it cannot interpret beside numpy 2.4.
    """
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("Triton before 3.8")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "import test_recurrent_computed as t; t.interpreted()"]
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def interpreted() -> None:
    """Compares, in a process in which Triton interprets; raises where something differs: with the
    settings of an H100, and as on a GPU with little shared memory and products from registers.
    """
    from longfactory.sp.recurrent import chunk_kernels

    cpu = torch.device("cpu")
    for call in itertools.product((False, True), repeat=3):
        assert convolution.kernels_on(torch.zeros(1, 16), 4, *call) is not None, call
    assert convolution.kernels_on(torch.zeros(1, 16), 5, False) is None  # too wide
    monkeypatch = pytest.MonkeyPatch()
    # Keys of 20 are in two blocks.
    monkeypatch.setattr(chunk_kernels, "IN_PARTS", ((8, 1, 16), 3, (16, 16)))
    both = (Fragment(0, 0, 70, 0, -1), Fragment(0, 70, 26, 70, -1))
    chunks = Fragments(both, 0, 1, 96).chunks(CHUNK, cpu)
    for (name, shape), small in itertools.product(SHAPES.items(), (False, True)):
        place = -1 if small else 0
        monkeypatch.setattr(chunk_kernels, "from_registers", lambda _, small=small: small)
        monkeypatch.setattr(
            chunk_kernels,
            "run_what_fits",
            lambda call, choices, run, refusal, place=place: run(choices[place]),
        )
        kind, keys, heads, dim, value_dim, per_channel = shape
        torch.manual_seed(0)
        rule = Rule(kind, dim**-0.5, normalize=kind == "delta")
        q, k = torch.randn(2, 96, keys, dim)
        v, slope = torch.randn(2, 96, heads, value_dim)
        g = -0.2 * torch.randn(96, heads, *([dim] if per_channel else [])).square()
        inputs = [q, k, v, g, torch.randn(96, heads).sigmoid()]
        first, after = torch.randn(2, 2, heads, dim, value_dim)
        wide = [x.double() for x in inputs]
        given = first.double(), slope.double(), after.double()
        for skip in (torch.randn(heads), None):
            found = computed.results(inputs, rule, chunks, first, slope, after, True, skip)
            factors = None if skip is None else skip.double()
            expected = computed.results(wide, rule, chunks, *given, False, factors)
            for a, b in zip(found, expected, strict=True):
                assert float((a.double() - b).norm()) <= 1e-5 * float(b.norm()), (name, skip, small)
