"""Stages on rows against a plain loop over single sequences: loss and every parameter's gradient in
float64, shared prompt on and off.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longfactory.config.loss_facts import PREFERENCE_FACTS
from longfactory.data.row import IGNORE, TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages import losses
from longfactory.stages.kto import KTOStage
from longfactory.stages.metrics import MetricSums
from longfactory.stages.pairs import document_logps, find_pairs
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.reward import RewardStage
from longfactory.stages.tokens import TokenStage
from oracles import (
    AT_START,
    CHOSEN,
    PROMPTS,
    REJECTED,
    VOCAB,
    kto_documents,
    naive,
    pair_row,
    s,
    smoothing,
    trl_dpo_loss,
    whole,
)
from tiny_stage_model import Tiny, assert_same


def naive_pairs(model: Tiny, samples: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    c = [model.answer(PROMPTS[i], CHOSEN[i]) for i in samples]
    r = [model.answer(PROMPTS[i], REJECTED[i]) for i in samples]
    return [torch.stack([x.sum() for x in y]) for y in (c, r)], [
        torch.tensor([float(len(x)) for x in y]).double() for y in (c, r)
    ]


@pytest.mark.parametrize("shared", [False, True], ids=["two-documents", "shared-prompt"])
@pytest.mark.parametrize("source", ["online", "stored"])
@pytest.mark.parametrize("name", sorted(losses.PREFERENCE_LOSSES))
def test_preference_loss_and_gradient(name: str, source: str, shared: bool) -> None:
    samples = [0, 1, 2, 3]
    policy, reference = Tiny(1), Tiny(2)
    b, e, gamma = 0.2, smoothing(name), 0.4
    with torch.no_grad():
        ref, _ = naive_pairs(reference, samples)
    pi, n = naive_pairs(policy, samples)
    want = naive(name, pi, ref, n, b, e, gamma).sum() + 0.3 * (-pi[0] / n[0]).sum()

    stored = {("chosen", i): float(ref[0][i]) for i in samples} | {
        ("rejected", i): float(ref[1][i]) for i in samples
    }
    row = pair_row(samples, shared, stored if source == "stored" else None)
    stage = PreferenceStage(name, losses.LossOptions(b, e, gamma), ftx=0.3)
    assert stage.count_items(row) == 4
    logps, _ = policy.of_row(row)
    online = (
        reference.of_row(row)[0].detach() if source == "online" and stage.needs_reference else None
    )
    got, metrics = stage.loss_sum(TokenOutputs(logps, reference=online), row)
    assert_same(policy, got, want)

    with torch.no_grad():  # the metrics
        if PREFERENCE_FACTS[name].per_token:
            pi, ref = (
                [x / k for x, k in zip(pi, n, strict=True)],
                [x / k for x, k in zip(ref, n, strict=True)],
            )
        if not stage.needs_reference:
            ref = [torch.zeros(4), torch.zeros(4)]
        chosen, rejected = b * (pi[0] - ref[0]), b * (pi[1] - ref[1])
        means = {k: float(t / c) for k, (t, c) in metrics.items()}
        expected = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": pi[0].mean(),
            "logps/rejected": pi[1].mean(),
        }
        for k, v in expected.items():
            assert means[k] == pytest.approx(float(v), abs=1e-9), k


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "bco_pair", "simpo"])
@pytest.mark.parametrize("shared", [False, True])
def test_ld_alpha(name: str, shared: bool) -> None:
    """Tokens beyond the shorter answer weigh alpha, in policy and reference; the loss is also
    TRL's.
    """
    samples, alpha = [0, 1, 2, 3], 0.3
    policy, reference = Tiny(1), Tiny(2)

    def weighted(model: Tiny, i: int, answers: list) -> Tensor:
        lp = model.answer(PROMPTS[i], answers[i])
        k = min(len(CHOSEN[i]), len(REJECTED[i]))
        return lp[:k].sum() + alpha * lp[k:].sum()

    sides = [
        [torch.stack([weighted(m, i, a) for i in samples]) for a in (CHOSEN, REJECTED)]
        for m in (policy, reference)
    ]
    n = [torch.tensor([float(len(a[i])) for i in samples]).double() for a in (CHOSEN, REJECTED)]
    want = naive(name, sides[0], [x.detach() for x in sides[1]], n, 0.2, 0.0, 0.5).sum()
    row = pair_row(samples, shared)
    stage = PreferenceStage(name, losses.LossOptions(0.2), ld_alpha=alpha)
    logps, ref = policy.of_row(row)[0], reference.of_row(row)[0]
    got, _ = stage.loss_sum(TokenOutputs(logps, reference=ref), row)
    assert_same(policy, got, want)
    if name != "simpo":
        longest = max(map(len, CHOSEN + REJECTED))
        tokens = [policy.answer(PROMPTS[i], a[i]) for a in (CHOSEN, REJECTED) for i in samples]
        padded = torch.stack([F.pad(t, (0, longest - len(t))) for t in tokens])
        mask = torch.stack([torch.arange(longest) < len(t) for t in tokens])
        pairs = SimpleNamespace(chosen_reference=sides[1][0], rejected_reference=sides[1][1])
        trl = trl_dpo_loss(name, padded, mask, pairs, 0.2, 0.0, ld_alpha=alpha)
        torch.testing.assert_close(got / 4, trl, rtol=1e-6, atol=1e-6)


def test_first_dpo_loss_is_log_2() -> None:
    """Bit for bit, in fp32 and fp64, whatever the number of pairs, online and stored."""
    for dtype in (torch.float32, torch.float64):
        for samples in ([0], [0, 1, 2], [3, 1]):
            row = pair_row(samples, shared=True)
            logps = Tiny(5).of_row(row)[0].detach().to(dtype)
            sums = document_logps(logps, row)
            stored = {
                (d.role, d.sample): float(x) for d, x in zip(row.documents, sums, strict=True)
            }
            stage = PreferenceStage("sigmoid")
            online, _ = stage.loss_sum(TokenOutputs(logps, reference=logps.clone()), row)
            kept, _ = stage.loss_sum(logps, pair_row(samples, True, stored))
            for loss in (online, kept):
                assert (loss / len(samples)).to(dtype) == torch.tensor(math.log(2), dtype=dtype)


@pytest.mark.parametrize("name", sorted(AT_START))
def test_first_loss_of_others(name: str) -> None:
    row = pair_row([0, 1, 2], shared=False)
    logps = Tiny(5).of_row(row)[0].float()
    loss, metrics = PreferenceStage(name).loss_sum(
        TokenOutputs(logps, reference=logps.detach()), row
    )
    assert float(loss.detach() / 3) == pytest.approx(AT_START[name], rel=1e-14)
    assert float(metrics["rewards/margins"][0]) == 0.0


def test_long_answers_keep_their_digits() -> None:
    """A log-ratio of 2^-12 between two answers near -120,000 survives: fp32 sums there are 2^-7
    apart.
    """
    n = 100_000
    docs = [
        TokenizedDocument([0] * (n + 1), [IGNORE] + [0] * n, role=r, sample=0)
        for r in ("chosen", "rejected")
    ]
    row = make_row(docs)
    reference = torch.full((2 * n + 2,), -1.2)
    policy = reference.clone()
    policy[5] += 2.0**-12
    p = PreferenceStage().pair_logps(TokenOutputs(policy, reference=reference), row)
    assert float(p.margin) == pytest.approx(2.0**-12, rel=1e-3)


def test_bco_weight_keeps_a_running_mean() -> None:
    policy, reference, w, b = Tiny(1), Tiny(2), 0.6, 0.5
    stage = PreferenceStage("sigmoid", losses.LossOptions(b), ftx=0.2, bco_weight=w)
    seen: list[float] = []
    for samples in ([0, 1], [2], [3, 0]):
        pi, n = naive_pairs(policy, samples)
        ref = [x.detach() for x in naive_pairs(reference, samples)[0]]
        x_c, x_r = b * (pi[0] - ref[0]), b * (pi[1] - ref[1])
        seen += x_c.tolist() + x_r.tolist()
        delta = sum(seen) / len(seen)
        bco = -torch.log(s(x_c - delta)) - torch.log(s(-(x_r - delta)))
        want = (
            (naive("sigmoid", pi, ref, n, b, 0, 0) + w * bco) / (1 + w) - 0.2 * pi[0] / n[0]
        ).sum()
        row = pair_row(samples, True)
        out = TokenOutputs(policy.of_row(row)[0], reference=reference.of_row(row)[0])
        with torch.no_grad():  # evaluation in between changes nothing
            PreferenceStage.loss_sum(stage, out, row)
        got, _ = stage.loss_sum(out, row)
        assert_same(policy, got, want)
    again = PreferenceStage("sigmoid", bco_weight=w)
    again.load_state_dict(stage.state_dict())
    assert again.state_dict() == stage.state_dict() and stage.state_dict()["rewards"][1] == 10


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_mean_logits_are_those_of_the_answers(kind: str, shared: bool) -> None:
    """TRL's definition: the mean over the vocabulary and over all tokens of the answers of one
    side.
    """
    tags = [1, 0, 0, 1]
    row = (
        make_row(kto_documents(tags)) if kind == "kto" else pair_row([0, 1, 2, 3], shared)
    ).padded(8, 0)
    z = torch.randn(
        len(row), VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    trained = row.labels != IGNORE
    stage = KTOStage() if kind == "kto" else PreferenceStage()
    out = TokenOutputs(
        torch.zeros(len(row)),
        mean_logit=torch.where(trained, z.mean(-1), 0.0),
        reference=torch.zeros(len(row)),
    )
    _, metrics = stage.loss_sum(out, row)
    for role in ("chosen", "rejected"):
        of = torch.zeros(len(row), dtype=torch.bool)
        for d in row.documents:
            of[d.start : d.stop] |= d.role == role
        total, count = metrics[f"logits/{role}"]
        assert float(total) / float(count) == pytest.approx(
            float(z[of & trained].mean()), rel=1e-12
        )
    assert (
        "logits/chosen"
        not in stage.loss_sum(TokenOutputs(out.logps, reference=out.reference), row)[1]
    )


def test_rows_add_up() -> None:
    """The sum over micro-batches is the sum over one batch: what makes the step's mean exact."""
    policy, reference = Tiny(1), Tiny(2)
    for name in ("sigmoid", "ipo", "orpo", "nca_pair"):
        total = torch.zeros((), dtype=torch.float64)
        for samples in ([0, 1, 2, 3], [0, 2], [1], [3]):
            row = pair_row(samples, True)
            out = TokenOutputs(
                policy.of_row(row)[0].detach(), reference=reference.of_row(row)[0].detach()
            )
            loss, _ = PreferenceStage(name, losses.LossOptions(0.3)).loss_sum(out, row)
            total = loss if len(samples) == 4 else total - loss
        assert float(total.abs()) < 1e-12


EMPTY = make_row([TokenizedDocument([0, 0], [IGNORE, IGNORE], role="pad")])


@pytest.mark.parametrize(
    "stage",
    [TokenStage(accuracy=True), RewardStage(), KTOStage(ftx=0.1)]
    + [
        PreferenceStage(
            n,
            losses.LossOptions(0.1, smoothing(n)),
            ftx=0.1,
            bco_weight=0.1 if PREFERENCE_FACTS[n].reference else 0.0,
        )
        for n in losses.PREFERENCE_LOSSES
    ],
    ids=lambda x: getattr(x, "pref_loss", type(x).__name__),
)
def test_a_row_without_items(stage) -> None:
    """Zero, attached to the graph, zero gradient, and the same metric names as any row has."""
    x = torch.randn(2, requires_grad=True)
    loss, metrics = stage.loss_sum(TokenOutputs(x, top1=torch.zeros(2, dtype=torch.bool)), EMPTY)
    assert float(loss) == 0.0 and stage.count_items(EMPTY) == 0
    (g,) = torch.autograd.grad(loss, x)
    assert g.tolist() == [0.0, 0.0]
    full = (
        make_row(kto_documents([1, 0])) if isinstance(stage, KTOStage) else pair_row([0, 1], False)
    )
    y = torch.zeros(len(full))
    _, other = stage.loss_sum(TokenOutputs(y, top1=y.bool(), reference=y), full)
    assert list(metrics) == list(other)
    sums = MetricSums()
    sums.add(metrics)
    assert all(math.isfinite(v) for v in sums.means().values())


def test_pairs_are_found_by_sample_and_role() -> None:
    row = pair_row([2, 0], shared=True)
    for c, r in find_pairs(row):
        assert (row.documents[c].role, row.documents[r].role) == ("chosen", "rejected")
        assert row.documents[c].sample == row.documents[r].sample
    lonely = make_row([whole(PROMPTS[0], CHOSEN[0], role="chosen", sample=7)])
    with pytest.raises(UserError, match="Sample 7 has 1 chosen and 0 rejected"):
        find_pairs(lonely)


def test_a_missing_reference_is_refused() -> None:
    row = pair_row([0], shared=False)
    with pytest.raises(UserError, match="answer of sample 0 has no reference log-probability"):
        PreferenceStage().loss_sum(torch.zeros(len(row)), row)


def test_metric_sums_are_means_over_items() -> None:
    sums = MetricSums()
    sums.add({"a": (torch.tensor(1.0), 1.0), "b": (torch.tensor(0.0), 0.0)})
    sums.add({"a": (torch.tensor(8.0), torch.tensor(2.0)), "b": (torch.tensor(0.0), 0.0)})
    assert sums.means(lambda x: 2 * x) == {"a": 3.0}
    assert sums.means() == {}
