"""Recurrences in chunks against the same ones token by token, and against transformers' own."""

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longfactory import sp
from longfactory.sp import Segment
from longfactory.sp.distance import worst
from longfactory.sp.recurrent import exchange, functions, heads, layers
from longfactory.sp.recurrent.chunked import recurrence
from longfactory.sp.recurrent.convolution import convolution
from longfactory.sp.recurrent.fragments import fragments_of
from longfactory.sp.recurrent.rule import Rule
from longfactory.testing import run_ranks

ROWS = {
    "one": [Segment(0, 160)],
    "packed": [Segment(0, 1), Segment(1, 2), Segment(2, 73), Segment(73, 160)],
    "branches": [Segment(0, 90), Segment(90, 91, 0), Segment(91, 150, 0), Segment(150, 160)],
    "nested": [Segment(0, 1), Segment(1, 100, 0), Segment(100, 103, 1), Segment(103, 160, 1)],
    "empty": [Segment(0, 0), Segment(0, 70, 0), Segment(70, 70, 1), Segment(70, 160, 2)],
}
KINDS = [("plain", False), ("plain", True), ("delta", False), ("delta", True)]
Inputs = list[Tensor]


def draw(per_channel: bool, dtype: torch.dtype = torch.float64, keys: int = 2) -> Inputs:
    torch.manual_seed(0)
    tokens, heads, dim, value_dim = 160, 4, 8, 6
    keys = heads if per_channel else keys
    q, k = torch.randn(2, tokens, keys, dim, dtype=dtype)
    v = torch.randn(tokens, heads, value_dim, dtype=dtype)
    # so little that what the first token writes is still read by the last
    g = -0.05 * torch.rand(tokens, heads, *([dim] if per_channel else []), dtype=dtype)
    beta = torch.rand(tokens, heads, dtype=dtype)
    return [x.requires_grad_() for x in (q, k / k.norm(dim=-1, keepdim=True), v, g, beta)]


def token_by_token(x: Inputs, kind: str, scale: float, segments: list[Segment]) -> Tensor:
    q, k, v, g, beta = x
    repeats = v.shape[1] // k.shape[1]
    q, k = q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1)
    outputs, ends = [], []
    for s in segments:
        state = ends[s.parent] if s.parent >= 0 else v.new_zeros(*k.shape[1:], v.shape[2])
        for t in range(s.start, s.stop):
            state = state * g[t].exp().reshape(v.shape[1], -1, 1)
            value = v[t]
            if kind == "delta":
                value = value - (state * k[t][..., None]).sum(1)
            state = state + k[t][..., None] * (beta[t][:, None] * value)[:, None]
            outputs.append(scale * (state * q[t][..., None]).sum(1))
        ends.append(state)
    return torch.stack(outputs)


def with_gradients(out: Tensor, x: Inputs) -> list[Tensor]:
    slope = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return [out, *torch.autograd.grad(out, x, slope)]


def farthest(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return worst((a - b).abs().max() / b.abs().max() for a, b in pairs)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("kind", "per_channel"), KINDS)
def test_recurrent_chunks_are_the_recurrence(kind: str, per_channel: bool, row: str) -> None:
    x = draw(per_channel)
    expected = with_gradients(token_by_token(x, kind, 0.3, ROWS[row]), x)
    plan = sp.plan(160, ROWS[row], sp.SequenceParallel())
    out = recurrence(*x, Rule(kind, 0.3), fragments_of(plan))
    assert farthest(with_gradients(out, x), expected) < 1e-12


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_recurrent_heads_in_parts(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(False, keys=keys)
    plan = sp.plan(160, ROWS["branches"], sp.SequenceParallel())
    skip = torch.arange(4, dtype=torch.float64).requires_grad_()
    found = []
    for bytes_ in (1 << 40, 1):
        monkeypatch.setattr(heads, "WORKSPACE", bytes_)
        out = recurrence(*x, Rule("delta", 0.3), fragments_of(plan), skip=skip)
        found.append(with_gradients(out, [*x, skip]))
    assert farthest(*found) < 1e-13


def test_recurrent_decays_that_would_overflow_if_undone() -> None:
    x = draw(True, torch.float32)
    with torch.no_grad():
        x[3].mul_(1800)
    plan = sp.plan(160, ROWS["one"], sp.SequenceParallel())
    out = recurrence(*x, Rule("delta", 0.3), fragments_of(plan))
    wide = [t.detach().double().requires_grad_() for t in x]
    expected = with_gradients(token_by_token(wide, "delta", 0.3, ROWS["one"]), wide)
    # The sums of logarithms in a chunk are near 3,000, of which float32 holds 2e-4.
    assert farthest([t.double() for t in with_gradients(out, x)], expected) < 5e-4


# ---- transformers' own functions


def delta_rule(code: Any, x: Inputs) -> Tensor:
    q, k, v, g, beta = x
    repeats = v.shape[1] // k.shape[1]
    q, k = q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1)
    name = "torch_chunk_gated_delta_rule" if g.dim() == 2 else "chunk_kimi_delta_attention"
    settings = {"initial_state": None, "output_final_state": False}
    return getattr(code, name)(
        q[None], k[None], v[None], g=g[None], beta=beta[None], use_qk_l2norm_in_kernel=True, **settings
    )[0][0]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "per_channel"), [("qwen3_next", False), ("qwen3_5", False), ("kimi_linear", True)]
)
def test_recurrent_delta_rules_are_those_of_transformers(family: str, per_channel: bool) -> None:
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    x = draw(per_channel)
    with layers._Widened():
        expected = with_gradients(delta_rule(code, x), x)
    plan = sp.plan(160, None, sp.SequenceParallel())
    out, _ = functions.delta_rule(
        plan, *(t[None] for t in x), use_qk_l2norm_in_kernel=True, unknown=None
    )
    assert farthest(with_gradients(out[0], x), expected) < 1e-12


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid", "mamba2"])
def test_recurrent_scan_of_mamba_2_is_that_of_transformers(family: str) -> None:
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    x, dt = torch.randn(1, 160, 4, 6), torch.randn(1, 160, 4)
    b, c = torch.randn(2, 1, 160, 2, 8)
    a, d, bias = -torch.rand(4) - 0.1, torch.randn(4), torch.randn(4)
    leaves = [t.double().requires_grad_() for t in (x, dt, a, b, c, d, bias)]
    x, dt, a, b, c, d, bias = leaves
    settings = {"D": d, "dt_bias": bias, "dt_softplus": True, "dt_limit": (0.1, 2.0)}
    with layers._Widened():
        expected = code.mamba2_chunk_scan(x, dt, a, b, c, chunk_size=32, **settings)
    plan = sp.plan(160, None, sp.SequenceParallel())
    out = functions.mamba2(plan, x, dt, a, b, c, chunk_size=32, **settings)
    assert farthest(with_gradients(out, leaves), with_gradients(expected, leaves)) < 1e-12


def test_recurrent_states_of_a_cache_are_refused() -> None:
    x = draw(False)
    plan = sp.plan(160, None, sp.SequenceParallel())
    with pytest.raises(ValueError, match="cached state"):
        functions.delta_rule(plan, *(t[None] for t in x), output_final_state=True)


# ---- short convolutions


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor, segments: list[Segment]) -> Tensor:
    outputs: list[Tensor] = []
    history: list[Tensor] = []
    for s in segments:
        before = history[s.parent] if s.parent >= 0 else x[:0]
        whole = torch.cat([before, x[s.start : s.stop]])
        history.append(whole)
        for t in range(len(before), len(whole)):
            out = bias.clone()
            for tap in range(weight.shape[1]):
                at = t - weight.shape[1] + 1 + tap
                out = out + (weight[:, tap] * whole[at] if at >= 0 else 0.0)
            outputs.append(torch.nn.functional.silu(out))
    return torch.stack(outputs)


def convolution_inputs() -> Inputs:
    torch.manual_seed(1)
    sizes = ((160, 5), (5, 4), (5,))
    return [torch.randn(*size, dtype=torch.float64).requires_grad_() for size in sizes]


@pytest.mark.parametrize("row", ROWS)
def test_recurrent_convolution_resets_at_documents(row: str) -> None:
    x = convolution_inputs()
    plan = sp.plan(160, ROWS[row], sp.SequenceParallel())
    out = convolution(*x, "silu", fragments_of(plan))
    expected = with_gradients(plain_convolution(*x, ROWS[row]), x)
    assert farthest(with_gradients(out, x), expected) < 1e-12


# ---- over ranks


def over_ranks(size: int, rows: list[str], cheap: list[bool]) -> float:
    """The largest error of recurrences and convolutions over ranks."""
    ctx = sp.SequenceParallel.create(size)
    errors = []
    for row, (kind, per_channel), way in itertools.product(rows, KINDS, cheap):
        x = draw(per_channel, keys=4)
        skip = torch.arange(4, dtype=torch.float64).requires_grad_()
        expected = token_by_token(x, kind, 0.3, ROWS[row]) + skip[:, None] * x[2]
        expected = with_gradients(expected, [*x, skip])
        plan = sp.plan(160, ROWS[row], ctx)
        mine = [sp.shard(t, plan) for t in x]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchange, "exchange_is_cheaper", lambda *_, yes=way: yes)
            out = exchange.over_ranks(*mine, Rule(kind, 0.3), plan, torch.float64, skip)
        out = sp.gather(out, plan)
        errors.append(farthest(_over_all(out, [*x, skip], size), expected))
    for row in rows:
        x = convolution_inputs()
        expected = with_gradients(plain_convolution(*x, ROWS[row]), x)
        plan = sp.plan(160, ROWS[row], ctx)
        out = convolution(sp.shard(x[0], plan), *x[1:], "silu", fragments_of(plan), ctx.group)
        errors.append(farthest(_over_all(sp.gather(out, plan), x, size), expected))
    return max(errors) if not any(map(math.isnan, errors)) else math.nan


def _over_all(out: Tensor, x: Inputs, size: int) -> list[Tensor]:
    """The gather's backward adds up the ranks' slopes."""
    found = with_gradients(out, x)
    for grad in found[1:]:
        torch.distributed.all_reduce(grad)
        grad /= size
    return found


@pytest.mark.processes
def test_recurrent_states_and_heads_travel_over_two_ranks() -> None:
    for error in run_ranks(2, over_ranks, 2, ["branches"], [False, True]):
        assert error < 1e-11


def chosen(heads: int, lengths: list[int], size: int = 2, flop_per_byte: float = 2850.0) -> bool:
    """Whether heads are exchanged for a gated delta net of Qwen3.5's kind."""
    ends = list(itertools.accumulate(lengths))
    segments = [Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    ctx = sp.SequenceParallel(size=size, flop_per_byte=flop_per_byte)
    plan = sp.plan(ends[-1], segments, ctx)
    with torch.device("meta"):
        q = torch.empty(ends[-1] // size, heads // 2, 128, dtype=torch.bfloat16)
        v = torch.empty(ends[-1] // size, heads, 128, dtype=torch.bfloat16)
        g = torch.empty(ends[-1] // size, heads)
    return exchange.exchange_is_cheaper(q, v, g, Rule("delta", 1.0), plan)


def test_recurrent_states_are_passed_or_heads_exchanged_by_their_cost() -> None:
    assert not chosen(32, [65536]), "half of the heads would take as many programs twice as long"
    assert not chosen(32, [131072], size=4)
    assert chosen(128, [65536]), "many heads fill the GPU, and states would be gone over again"
    assert not chosen(128, [65536], flop_per_byte=28500.0), "slow links"
    assert not chosen(122, [65536]), "61 key heads do not divide"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("heads", [False, True])
def test_recurrent_states_or_heads_over_ranks(size: int, heads: bool) -> None:
    for error in run_ranks(size, over_ranks, size, list(ROWS), [heads]):
        assert error < 1e-11
