"""Layers that choose keys by an indexer, on a GPU: attention over chosen keys in bf16, whom `topk`
prefers of equal scores, the guard, and memory.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from longfactory import sp
from longfactory.sp import hf, indexer, routers, sparse
from longfactory.sp.guard import guard
from longfactory.sp.hooks import ModelHooks
from longfactory.sp.sparse import Chosen
from longfactory_dev.tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (1400, 1, 2695)
TOKENS = sum(LENGTHS)
# heads, key heads, dim, value dim, choices, block, sinks
SHAPES = {
    "latent attention": (8, 8, 192, 128, 1, 1, False),
    "latent attention with sinks": (8, 8, 256, 256, 1, 1, True),
    "blocks of keys": (16, 2, 128, 128, 2, 64, False),
}


def plan_of(lengths: tuple[int, ...]) -> sp.RowPlan:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    segments = [sp.Segment(e - n, e) for n, e in zip(lengths, ends, strict=True)]
    return sp.plan(ends[-1], segments, sp.SequenceParallel.create(1))


def mask_of(chosen: Chosen) -> Tensor:
    """[choices, T, T] bool of the whole row."""
    mask = torch.zeros(len(chosen.indices), TOKENS, TOKENS, dtype=torch.bool, device="cuda")
    start = 0
    for n in LENGTHS:
        rows = slice(start, start + n)
        mask[:, rows, rows] = chosen.mask(rows, slice(0, n))
        start += n
    return mask


def plain(x: list[Tensor], mask: Tensor, scale: float) -> Tensor:
    """As transformers' eager attention: softmax in float32, weights in the model's precision."""
    q, k, v = (t.transpose(0, 1) for t in x[:3])
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    scores = scores.masked_fill(~mask.repeat_interleave(len(q) // len(mask), 0), float("-inf"))
    if len(x) == 4:
        scores = torch.cat([scores, x[3][:, None, None].expand(-1, TOKENS, 1)], -1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(q.dtype)[..., :TOKENS]
    return (weights @ v).transpose(0, 1)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_indexer_attention_is_as_near_as_transformers_own(shape: str) -> None:
    heads, kv_heads, dim, value_dim, choices, block, with_sinks = SHAPES[shape]
    torch.manual_seed(0)
    sizes = [(TOKENS, heads, dim), (TOKENS, kv_heads, dim), (TOKENS, kv_heads, value_dim)]
    x = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    if with_sinks:
        x.append(torch.randn(heads, device="cuda", dtype=torch.bfloat16))
    places = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS])
    picks = torch.rand(choices, TOKENS, 256 // block, device="cuda")
    picks = (picks * (places[:, None] // block + 1)).int()
    picks[..., 0] = places // block
    chosen, scale = Chosen(picks, block), dim**-0.5
    slope = torch.randn(TOKENS, heads, value_dim, device="cuda", dtype=torch.bfloat16)
    mask = mask_of(chosen)

    def graded(dtype: torch.dtype, own: bool) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in x]
        if own:
            out = plain(leaves, mask, scale)
        else:
            sinks = leaves[3] if with_sinks else None
            plan = plan_of(LENGTHS)
            out = sparse.attention(*leaves[:3], plan, chosen, scale=scale, sinks=sinks)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(dtype))]

    exact = graded(torch.float64, own=True)
    ours, theirs = (graded(torch.bfloat16, own=own) for own in (False, True))
    for name, e, a, b in zip(("out", "q", "k", "v", "sinks"), exact, ours, theirs, strict=False):
        error, own_error = ((t.double() - e).norm() / e.norm() for t in (a, b))
        print(f"{shape}, {name}: {error:.2e}, transformers' own {own_error:.2e}", flush=True)
        assert error <= 1.2 * own_error, name


def choices_of(model: torch.nn.Module, ids: Tensor, sharded: bool) -> dict[str, list[Tensor]]:
    with torch.no_grad(), routers.record(model) as found:
        if sharded:
            positions = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS])
            row = {"input_ids": ids, "position_ids": positions}
            model(**hf.inputs(row, plan_of(LENGTHS)))
        else:
            model(input_ids=ids[None], use_cache=False)
    return found.of


@pytest.mark.parametrize("tied", [False, True])
def test_indexer_prefers_whom_the_document_alone_prefers(tied: bool) -> None:
    """Every choice of the first layer, whose input is the same: its rows are only embedded."""
    model = tiny_model(
        "deepseek_v32", torch.float32, index_topk=64, index_n_heads=8, max_position_embeddings=4096
    ).cuda()
    if tied:
        for name, p in model.named_parameters():
            if "weights_proj" in name:
                p.data.zero_()
    own = copy.deepcopy(model)
    hf.prepare(model, sp.SequenceParallel.create(1))
    ids = torch.randint(3, 200, (TOKENS,), device="cuda")
    found = choices_of(model, ids, sharded=True)
    names = sorted(routers.indexers(model))[:1]
    start, other, prefix = 0, 0, 0
    for n in LENGTHS:
        alone = choices_of(own, ids[start : start + n], sharded=False)
        half = choices_of(own, ids[start : start + max(1, n // 2)], sharded=False)
        visible = torch.arange(n)[:, None]
        for name in names:
            width = alone[name][0].shape[1]

            def seen(picks: Tensor, visible: Tensor = visible) -> Tensor:
                return torch.where(picks > visible[: len(picks)], -1, picks).sort(-1).values

            a, b = seen(found[name][0][start : start + n, :width]), seen(alone[name][0])
            other += int((a != b).any(-1).sum())
            c = seen(half[name][0])
            if c.shape[1] == width:
                prefix += int((b[: len(c)] != c).any(-1).sum())
        start += n
    print(
        f"tied {tied}: {other} of {TOKENS} queries choose otherwise than in the document alone;"
        f" {prefix} choose otherwise in its first half alone",
        flush=True,
    )
    assert other == 0


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text"])
def test_indexer_guard_passes_in_bf16(family: str) -> None:
    model = tiny_model(family, torch.bfloat16).cuda()
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    guard(model, ctx)


def test_indexer_memory_grows_with_the_row() -> None:
    """Never [T, T]: of 32k tokens and 16 heads those scores would be 32 GiB in bf16."""
    heads, peaks = 16, {}
    for tokens in (4096, 16384, 32768):
        x = [
            torch.randn(tokens, heads, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for d in (192, 192, 128)
        ]
        visible = torch.arange(1, tokens + 1, device="cuda")[:, None]
        picks = (torch.rand(1, tokens, 2048, device="cuda") * visible).int()
        plan = plan_of((tokens,))

        def chosen_keys(x: list[Tensor] = x, picks: Tensor = picks, plan: Any = plan) -> Tensor:
            return sparse.attention(*x, plan, Chosen(picks), scale=0.07)

        def every_key(x: list[Tensor] = x, plan: Any = plan) -> Tensor:
            return sp.attention(*x, plan, scale=0.07)

        for name, run in (("chosen keys", chosen_keys), ("every key", every_key)):
            torch.autograd.grad(run().sum(), x)  # kernels are loaded
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            out = run()
            torch.cuda.synchronize()
            forward = time.perf_counter() - start
            torch.autograd.grad(out.sum(), x)
            torch.cuda.synchronize()
            both = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() - before
            flop = tokens**2 * heads * (192 + 128)
            print(
                f"{name}, {tokens} tokens, {heads} heads: forward {forward:.3f} s"
                f" ({flop / forward / 1e12:.0f} TFLOP/s causal), backward {both - forward:.3f} s"
                f" ({2.5 * flop / (both - forward) / 1e12:.0f}), peak {peak / 2**30:.2f} GiB",
                flush=True,
            )
            if name == "chosen keys":
                peaks[tokens] = peak
            del out
        del x, picks
    assert peaks[32768] < 2.5 * peaks[16384]
    assert peaks[32768] < 6 * 2**30


def test_indexer_scores_of_many_keys() -> None:
    """One layer of DeepSeek-V3.2's indexer: 64 heads of 128, of 2,048 queries among 32k keys."""
    layer = tiny_model(
        "deepseek_v32", torch.bfloat16, index_topk=2048, index_n_heads=64, index_head_dim=128,
        max_position_embeddings=32768,
    ).model.layers[0].self_attn.indexer.cuda()  # fmt: skip
    tokens, queries = 32768, 2048
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 64, device="cuda", dtype=torch.bfloat16)
    compressed = torch.randn(1, tokens, layer.q_lora_rank, device="cuda", dtype=torch.bfloat16)
    turns = torch.rand(1, tokens, layer.qk_rope_head_dim, device="cuda", dtype=torch.bfloat16)
    hooks = ModelHooks()
    holder = torch.nn.Module()
    holder.indexer = layer
    indexer.prepare(holder, hooks)
    plan = plan_of((tokens,))
    last = [
        sparse.Stretch(slice(0, queries), 0, tokens, ((0, tokens),)),
        sparse.Stretch(slice(tokens - queries, tokens), tokens - queries, tokens, ((0, tokens),)),
    ]
    sparse._stretches[plan] = tuple(last)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        picks = layer(hidden, compressed, (turns, turns), indexer.MASK, None, indexer.RowKeys(plan))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before
    print(
        f"scores of {queries} queries among {tokens} keys: {seconds:.3f} s"
        f" ({2 * 64 * 129 * queries * tokens / seconds / 1e12:.1f} TFLOP/s), peak"
        f" {peak / 2**30:.2f} GiB",
        flush=True,
    )
    assert picks.shape == (1, tokens, 2048)
    assert peak < 4 * 2**30
