"""Recurrent layers on a GPU: the Triton kernels against float64, and against transformers' own
functions in the same precision.
"""

from __future__ import annotations

import collections
import importlib
import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from longfactory import sp
from longfactory.sp import Segment, shared_memory
from longfactory.sp.recurrent import computed
from longfactory.sp.recurrent.chunked import recurrence
from longfactory.sp.recurrent.convolution import convolution, kernels_on
from longfactory.sp.recurrent.fragments import fragments_of
from longfactory.sp.recurrent.rule import Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # a first call compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROW = [Segment(0, 400), Segment(400, 401, 0), Segment(401, 700, 0), Segment(700, 1024)]
SHAPES = {
    "delta 128": ("delta", 8, 16, 128, 128),
    "delta 64 and 100": ("delta", 2, 2, 64, 100),
    "plain 128 and 64": ("plain", 1, 16, 128, 64),
    "plain 256 and 64": ("plain", 1, 16, 256, 64),
    "delta 128, a decay of each channel": ("delta", 16, 16, 128, 128),
    "delta 64 and 100, a decay of each channel": ("delta", 1, 2, 64, 100),
    "plain 16 and 1, a decay of each channel": ("plain", 1, 32, 16, 1),
}
"""Kind, key heads, heads, and dims of keys and values. Compiling the kernels takes nearly all of a
test's time: with heads that 16 divides they are those of the proof that every run begins with
(`computed._are_right`). Those of 64 and 100 are compiled for strides that 16 does not divide.
"""

NAMES = ("out", "q", "k", "v", "g", "beta")
SEEDS = range(5)


def draw(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor, Rule]:
    kind, keys, heads, dim, value_dim = SHAPES[name]
    torch.manual_seed(seed)
    tokens = ROW[-1].stop
    q, k = torch.randn(2, tokens, keys, dim, device="cuda", dtype=dtype)
    v = torch.randn(tokens, heads, value_dim, device="cuda", dtype=dtype)
    beta = torch.rand(tokens, heads, device="cuda")
    decays = (tokens, heads, dim) if "channel" in name else (tokens, heads)
    g = -0.3 * torch.rand(*decays, device="cuda")
    slope = torch.randn(v.shape, device="cuda", dtype=dtype)
    rule = Rule("delta", dim**-0.5, True) if kind == "delta" else Rule("plain", dim**-0.5)
    return [q, k, v, g, beta], slope, rule


def graded(run: Any, x: list[Tensor], slope: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in x]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "skips"),
    [(name, False) for name in SHAPES] + [(n, True) for n in SHAPES if n.startswith("plain")],
)
def test_recurrent_kernels(name: str, skips: bool, dtype: torch.dtype) -> None:
    x, slope, rule = draw(name, dtype)
    fragments = fragments_of(sp.plan(ROW[-1].stop, ROW, sp.SequenceParallel(device_type="cuda")))

    if skips:
        x.append(torch.randn(x[2].shape[1], device="cuda"))

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *skip: Tensor) -> Tensor:
        added = skip[0] if skip else None
        return recurrence(q, k, v, g, beta, rule, fragments, None, None, added)

    exact = graded(run, [t.double() for t in x], slope.double())
    assert computed.by_kernels(x[:5], rule, skips)
    found = errors(graded(run, x, slope), exact)
    assert max(found) < (4e-3 if dtype == torch.bfloat16 else 1e-5), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["delta 128", "delta 128, a decay of each channel"])
def test_recurrent_kernels_in_the_shared_memory_of_a_smaller_gpu(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton is told of 99 KB, which an RTX 4090 has, and sums are taken as where tensor cores
    multiply from registers. The machine code is this GPU's. Hopper's takes more than an RTX 4090's
    in some kernels, so that blocks may be smaller here than there.
    """
    from triton.compiler import compiler

    from longfactory.sp.recurrent import (
        backward_kernels,
        channel_kernels,
        chunk_kernels,
        forward_kernels,
    )

    refused: collections.Counter[Any] = collections.Counter()
    monkeypatch.setattr(shared_memory, "_refused", refused)
    monkeypatch.setattr(compiler, "max_shared_mem", lambda device: 99 << 10)
    monkeypatch.setattr(chunk_kernels, "from_registers", lambda device: True)

    def clear() -> None:
        """What is loaded is not compared again, and what was refused stays so."""
        computed._are_right.cache_clear()
        for module in (forward_kernels, backward_kernels, channel_kernels):
            for kernel in vars(module).values():
                if hasattr(kernel, "device_caches"):
                    kernel.device_caches.clear()

    x, slope, rule = draw(name, dtype)
    fragments = fragments_of(sp.plan(ROW[-1].stop, ROW, sp.SequenceParallel(device_type="cuda")))

    def run(*x: Tensor) -> Tensor:
        return recurrence(*x, rule, fragments, None, None)

    clear()
    try:
        exact = graded(run, [t.double() for t in x], slope.double())
        found = errors(graded(run, x, slope), exact)
        assert computed.by_kernels(x, rule)
    finally:
        clear()
    assert any(call[0][0] == "chunk_scan" for call in refused)
    assert max(found) < (4e-3 if dtype == torch.bfloat16 else 1e-5), found


FUNCTIONS = {
    "delta 128": ("qwen3_next", "torch_chunk_gated_delta_rule"),
    "delta 128, a decay of each channel": ("kimi_linear", "chunk_kimi_delta_attention"),
}
"""Of transformers, by shape: the module of a family and its recurrence."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_recurrent_kernels_beside_transformers(name: str) -> None:
    family, function = FUNCTIONS[name]
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    fragments = fragments_of(sp.plan(1024, None, sp.SequenceParallel(device_type="cuda")))
    mine: list[list[float]] = []
    own: list[list[float]] = []
    for seed in SEEDS:
        x, slope, rule = draw(name, torch.bfloat16, seed)

        def ours(*x: Tensor, rule: Rule = rule) -> Tensor:
            return recurrence(*x, rule, fragments, None, None)

        def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            q, k = (t.repeat_interleave(v.shape[1] // k.shape[1], 1) for t in (q, k))
            out, _ = getattr(code, function)(
                q[None], k[None], v[None], g=g[None], beta=beta[None], initial_state=None,
                output_final_state=False, use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            return out[0]

        exact = graded(ours, [t.double() for t in x], slope.double())
        mine.append(errors(graded(ours, x, slope), exact))
        own.append(errors(graded(theirs, x, slope), exact))
    # Those of g and beta are of float32 there: they are held to the outputs' rounding.
    medians = [
        (part, statistics.median(a), statistics.median(b))
        for part, a, b in zip(NAMES, zip(*mine, strict=True), zip(*own, strict=True), strict=True)
    ]
    table = "\n".join(
        f"{part:5} ours {a:.2e}  transformers {b:.2e}  over the larger of that and 1e-3:"
        f" {a / max(b, 1e-3):.2f}"
        for part, a, b in medians
    )
    print("\n" + table)
    assert all(a < 1.2 * max(b, 1e-3) for _, a, b in medians), "\n" + table


@pytest.mark.parametrize("activation", ["silu", None])
def test_recurrent_convolution_kernels(activation: str | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(1024, 200, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(200, 4, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(200, device="cuda", dtype=torch.bfloat16)
    slope = torch.randn_like(x)
    fragments = fragments_of(sp.plan(1024, ROW, sp.SequenceParallel(device_type="cuda")))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolution(x, weight, bias, activation, fragments)

    exact = graded(run, [t.double() for t in (x, weight, bias)], slope.double())
    for call in itertools.product((False, True), repeat=2):  # rows of other ranks, a bias
        assert kernels_on(x, 4, *call, activation is not None) is not None, call
    assert max(errors(graded(run, [x, weight, bias], slope), exact)) < 4e-3
