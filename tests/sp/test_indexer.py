"""Layers that choose the keys of each query by an indexer, and attention over chosen keys."""

import copy
import itertools

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from longfactory import sp
from longfactory.sp import compare, guard, hf, indexer, routers, sparse
from longfactory.sp.distance import worst
from longfactory.sp.sparse import Chosen
from longfactory.testing import run_ranks
from longfactory_dev.families import check_on_rank
from longfactory_dev.tiny_models import tiny_model

FAMILIES = [
    "glm_moe_dsa",
    "axk2",
    "hy_v4",
    "dots3_note_text",
    "dots3_note",
    "mistral_large4",
    "minimax_m3_vl_text",
    "minimax_m3_vl",
]
# A prompt with two branches, one token alone, a long document that crosses borders of ranks.
SEGMENTS = (
    sp.Segment(0, 19),
    sp.Segment(19, 29, 0),
    sp.Segment(29, 46, 0),
    sp.Segment(46, 47),
    sp.Segment(47, 88),
)


def chain(number: int) -> list[int]:
    """Rows of a segment and of its parents."""
    segment = SEGMENTS[number]
    before = chain(segment.parent) if segment.parent >= 0 else []
    return [*before, *range(segment.start, segment.stop)]


def positions() -> Tensor:
    return torch.cat(
        [torch.arange(len(chain(i)))[-(s.stop - s.start) :] for i, s in enumerate(SEGMENTS)]
    )


def plain(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, sinks: Tensor | None
) -> Tensor:
    """With a mask of all pairs, [heads, T, T]."""
    group, each = q.shape[1] // k.shape[1], q.shape[1] // chosen.shape[0]
    mask = torch.zeros(len(chosen), 88, 88, dtype=torch.bool)
    for number, segment in enumerate(SEGMENTS):
        keys = chain(number)
        for row in range(segment.start, segment.stop):
            for choice, picks in enumerate(chosen[:, row].tolist()):
                places = [p * block + i for p in picks if p >= 0 for i in range(block)]
                mask[choice, row, [keys[p] for p in places if p <= keys.index(row)]] = True
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = 0.3 * torch.einsum("qhd,khd->hqk", q, k)
    scores = scores.masked_fill(~mask.repeat_interleave(each, 0), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, 88, 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :88], v)


def compared(size: int, sets: int, block: int, with_sinks: bool, workspace: int) -> float:
    ctx = sp.SequenceParallel.create(size)
    draw = torch.Generator().manual_seed(3)
    plan = sp.plan(88, SEGMENTS, ctx)
    wide = {"generator": draw, "dtype": torch.float64}
    q, k, v = (torch.randn(88, h, d, **wide) for h, d in ((8, 6), (4, 6), (4, 5)))
    sinks = torch.randn(8, **wide) if with_sinks else None
    units = -(-41 // block)
    picks = torch.stack(
        [torch.randperm(units, generator=draw)[: units // 3] for _ in range(sets * 88)]
    ).view(sets, 88, -1)
    # Its own key, or block, is seen by every query; the last pick of some is none.
    picks[..., 0] = positions() // block
    picks[:, ::3, -1] = -1
    slope = torch.randn(88, 8, 5, **wide)

    whole = [x.clone().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    expected = plain(*whole[:3], picks, block, whole[3] if with_sinks else None)
    expected_grads = torch.autograd.grad(expected, whole, slope)

    mine = [sp.shard(x, plan).clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        mine.append(sinks.clone().requires_grad_())
    before = sparse.WORKSPACE, sparse.GATHERED
    sparse.WORKSPACE, sparse.GATHERED = workspace, workspace
    try:
        chosen = Chosen(picks[:, plan.index].int(), block)
        own_sinks = mine[3] if with_sinks else None
        out = sparse.attention(*mine[:3], plan, chosen, scale=0.3, sinks=own_sinks)
        grads = torch.autograd.grad(out, mine, sp.shard(slope, plan))
    finally:
        sparse.WORKSPACE, sparse.GATHERED = before
    pairs = [(out, sp.shard(expected, plan))]
    pairs += [(a, sp.shard(b, plan)) for a, b in zip(grads[:3], expected_grads[:3], strict=True)]
    if with_sinks:
        total = grads[3].clone()
        if size > 1:
            torch.distributed.all_reduce(total)
        pairs.append((total, expected_grads[3]))
    return worst((a - b).abs().max() for a, b in pairs)


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2, 4])
def test_indexer_attention_over_chosen_keys(size: int) -> None:
    cases = [(1, 1, False, 1 << 28), (1, 1, True, 4000), (4, 4, False, 4000), (2, 3, True, 3000)]
    for case in cases:
        errors = [compared(1, *case)] if size == 1 else run_ranks(size, compared, size, *case)
        assert max(errors) < 1e-12, case


def chosen_alike(size: int, family: str, tied: bool) -> bool:
    """Whether every indexer chooses, of each document, what it chooses in the document alone."""
    ctx = sp.SequenceParallel.create(size)
    model = tiny_model(family)
    if tied:
        for module in indexer.indexers(model):
            for name, p in module.named_parameters():
                if "weights_proj" in name or "q_proj" in name:
                    p.data.zero_()
    own = copy.deepcopy(model)
    hf.prepare(model, ctx)
    lengths = [21, 1, 5, 61]
    ends = list(itertools.accumulate(lengths))
    plan = sp.plan(88, [sp.Segment(e - n, e) for n, e in zip(lengths, ends, strict=True)], ctx)
    ids = torch.randint(3, 200, (88,), generator=torch.Generator().manual_seed(5))
    places = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad(), routers.record(model) as found:
        model(**hf.inputs({"input_ids": ids, "position_ids": places}, plan))
    recorded = []
    for part in ids.split(lengths):
        with torch.no_grad(), routers.record(own) as alone:
            own(input_ids=part[None], use_cache=False)
        recorded.append(alone)
    expected = routers.join(recorded).take(plan.index)
    names = routers.indexers(model)
    assert names
    visible = places[plan.index][:, None]
    if (block := getattr(next(iter(names.values())), "block_size", 1)) > 1:
        visible = visible // block

    def seen(picks: Tensor) -> list[list[int]]:
        picks = torch.where(picks > visible, -1, picks).sort(-1).values
        return [sorted({p for p in row if p >= 0}) for row in picks.tolist()]

    return all(seen(found.of[n][0]) == seen(expected.of[n][0]) for n in names)


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_indexer_chooses_as_in_the_document_alone(size: int, tied: bool) -> None:
    assert all(run_ranks(size, chosen_alike, size, "deepseek_v32", tied))


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm_moe_dsa", "hy_v4", "minimax_m3_vl_text"])
def test_indexer_of_every_form_chooses_as_in_the_document_alone(family: str) -> None:
    for tied in (False, True):
        assert all(run_ranks(4, chosen_alike, 4, family, tied))


@pytest.mark.processes
def test_indexer_family_is_exact() -> None:
    for result in run_ranks(2, check_on_rank, "deepseek_v32", 2):
        assert result.verdict == "exact", result


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_indexer_families_are_exact(family: str, size: int) -> None:
    for result in run_ranks(size, check_on_rank, family, size, timeout=300):
        assert result.verdict == "exact", result


def branches(size: int, family: str) -> tuple[float, float]:
    """A shared prompt with two branches: errors of the logits and of the gradients.

    With many heads, so that no scores are equal: whom `topk` prefers of equal ones may depend on
    the length of the document, and a shared prompt belongs to two.
    """
    ctx = sp.SequenceParallel.create(size)
    heads = {} if "minimax" in family else {"index_n_heads": 16}
    model = tiny_model(family, **heads)
    own = copy.deepcopy(model)
    hf.prepare(model, ctx)
    ids = torch.randint(3, 200, (88,), generator=torch.Generator().manual_seed(5))
    plan = sp.plan(88, SEGMENTS, ctx)
    logits = model(**hf.inputs({"input_ids": ids, "position_ids": positions()}, plan)).logits[0]
    whole = sp.gather(logits, plan)
    (whole.pow(2).sum() / size).backward()
    parts = []
    for number, segment in enumerate(SEGMENTS):
        alone = own(input_ids=ids[chain(number)][None], use_cache=False).logits[0]
        parts.append(alone[-(segment.stop - segment.start) :])
    reference = torch.cat(parts)
    reference.pow(2).sum().backward()
    scale = max(p.grad.abs().max() for p in own.parameters() if p.grad is not None)
    worst = 0.0
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is None:
            continue
        grad = p.grad.clone()
        if size > 1:
            torch.distributed.all_reduce(grad)
        worst = max(worst, ((grad - q.grad).abs().max() / scale).item())
    return ((whole - reference).abs().max() / reference.abs().max()).item(), worst


@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("deepseek_v32", 2),
        pytest.param("glm_moe_dsa", 4, marks=pytest.mark.slow),
        pytest.param("minimax_m3_vl_text", 2, marks=pytest.mark.slow),
        pytest.param("minimax_m3_vl_text", 4, marks=pytest.mark.slow),
    ],
)
def test_indexer_branches_choose_among_their_parents_keys(family: str, size: int) -> None:
    for logits, gradients in run_ranks(size, branches, size, family):
        assert logits < 2e-6
        assert gradients < 2e-6


def test_indexer_rests_where_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of no more tokens than a query may choose: the engine's own attention."""
    ctx = sp.SequenceParallel.create(1)
    calls: list[int] = []
    engine = hf.engine
    monkeypatch.setattr(hf, "engine", lambda *a, **k: (calls.append(1), engine(*a, **k))[1])
    model = tiny_model("deepseek_v32", index_topk=24)
    hf.prepare(model, ctx)
    for lengths, expected in (((24, 24), 4), ((23, 25), 0)):
        ends = list(itertools.accumulate(lengths))
        plan = sp.plan(48, [sp.Segment(e - n, e) for n, e in zip(lengths, ends, strict=True)], ctx)
        places = torch.cat([torch.arange(n) for n in lengths])
        model(**hf.inputs({"input_ids": torch.arange(48) + 3, "position_ids": places}, plan))
        assert len(calls) == expected
        calls.clear()


def test_indexer_scores_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = sp.SequenceParallel.create(1)
    model = tiny_model("deepseek_v32")
    hf.prepare(model, ctx)
    row = {"input_ids": torch.arange(40) + 3, "position_ids": torch.arange(40)}
    plan = sp.plan(40, None, ctx)
    whole = model(**hf.inputs(row, plan)).logits
    sizes: list[int] = []
    own = torch.Tensor.topk
    monkeypatch.setattr(indexer, "SCORES", 4 * 2 * 40 * 7)  # of 7 queries
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda x, *a, **k: (sizes.append(x.shape[-2]), own(x, *a, **k))[1]
    )
    assert torch.equal(model(**hf.inputs(row, plan)).logits, whole)
    assert 7 in sizes


def test_indexer_without_a_choice_is_refused() -> None:
    ctx = sp.SequenceParallel.create(1)
    model = tiny_model("deepseek_v32")
    hf.prepare(model, ctx)
    layer = model.model.layers[0].self_attn
    q = torch.zeros(1, 4, 8, 24)
    with pytest.raises(ValueError, match="has an indexer, and no chosen keys"):
        hf.attention(layer, q, q, q, sp_plan=sp.plan(8, None, ctx))
    with pytest.raises(ValueError, match="sliding window"):
        hf.attention(
            layer,
            q,
            q,
            q,
            sp_plan=sp.plan(8, None, ctx),
            indices=torch.zeros(1, 8, 2, dtype=torch.int32),
            sliding_window=4,
        )


def test_indexer_of_another_kind_is_refused() -> None:
    reasons = {
        "qwen4_exp": "its indexer scores means of several keys",
        "glm5_next": "its indexer scores pools of several keys",
        "deepseek_v4": "its attention reads, beside a window, one compressed key",
    }
    for family, reason in reasons.items():
        found = hf.unsupported(CONFIG_MAPPING[family]())
        assert found is not None
        assert found.startswith(reason)


def test_indexer_refuses_blocks_of_tokens_that_see_each_other() -> None:
    plan = sp.plan(
        8, [sp.Segment(0, 4, block=True), sp.Segment(4, 8, 0)], sp.SequenceParallel.create(1)
    )
    with pytest.raises(ValueError, match="in both directions"):
        sparse.stretches_of(plan)


@pytest.mark.parametrize("wrong", ["places", "document", "keys"])
def test_indexer_guard_sees_a_wrong_choice(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of other keys, of another document's keys, and attention over all of them."""
    own_choose, own_of = Chosen.mask, sparse.Stretch.of
    if wrong == "places":
        monkeypatch.setattr(
            Chosen, "mask", lambda c, *a: own_choose(Chosen(c.indices ^ 1, c.block), *a)
        )
    elif wrong == "document":
        monkeypatch.setattr(
            sparse.Stretch,
            "of",
            lambda s, x: own_of(s, x.flip(0)) if x.dim() == 2 else own_of(s, x),
        )
    else:
        everything = torch.arange(300, dtype=torch.int32)
        monkeypatch.setattr(
            Chosen,
            "mask",
            lambda c, *a: own_choose(Chosen(everything.expand(*c.indices.shape[:2], -1)), *a),
        )
    ctx = sp.SequenceParallel.create(1)
    model = tiny_model("deepseek_v32")
    hf.prepare(model, ctx)
    with pytest.raises(ValueError, match="cannot be trained here"):
        guard.guard(model, ctx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indexer_guard_passes_with_real_sizes_lowered(dtype: torch.dtype) -> None:
    """What a query may choose is lowered for the guard's documents, and is as before after it."""
    ctx = sp.SequenceParallel.create(1)
    model = tiny_model("glm_moe_dsa", dtype, index_topk=2048, index_n_heads=8)
    hf.prepare(model, ctx)
    seen: list[int] = []
    for module in indexer.indexers(model):
        module.register_forward_hook(lambda m, a, out: seen.append(out.shape[-1]))
    guard.guard(model, ctx)
    assert guard.fixed.WINDOW in seen
    assert {m.index_topk for m in indexer.indexers(model)} == {2048}
    assert compare.limit(dtype) > 1
