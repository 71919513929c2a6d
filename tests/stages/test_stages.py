"""Stages on rows against a plain loop over single sequences: loss and every parameter's gradient in
float64, shared prompt on and off.
"""

from __future__ import annotations

import ast
import importlib.metadata
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfactory.config.loss_facts import PREFERENCE_FACTS
from longfactory.config.stage_facts import STAGES
from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.errors import ConfigError, UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages import losses
from longfactory.stages.kto import KTOStage
from longfactory.stages.make import make_stage
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
    Groups,
    kto_documents,
    naive,
    pair_row,
    s,
    smoothing,
    trl_dpo_loss,
    whole,
)

WIDTH = 12


class Tiny(nn.Module):
    """Two attention layers, positions, an output layer and a value head, in float64. `allowed` is
    the [T, T] mask of who sees whom.
    """

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head, self.value = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, 1)
        self.double()

    def hidden(self, ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        h = self.embed(ids) + self.place(positions)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(h).chunk(3, -1)
            h = h + torch.tanh(
                out(((q @ k.t()) / WIDTH**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
            )
        return h

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        """[T] log-probabilities of the labels (noise where there is none) and [T] values."""
        d, t = row.document_ids, torch.arange(len(row))
        parent = torch.tensor([x.parent for x in row.documents])
        h = self.hidden(
            row.input_ids,
            row.position_ids,
            ((d[:, None] == d) & (t[:, None] >= t)) | (parent[d][:, None] == d),
        )
        logps = self.head(h).log_softmax(-1).gather(1, row.labels.clamp(min=0)[:, None])[:, 0]
        return logps, self.value(h)[:, 0]

    def of_text(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """One sequence alone: [n-1, V] log-probabilities of what follows, and [n] values."""
        n = len(ids)
        h = self.hidden(torch.tensor(ids), torch.arange(n), torch.ones(n, n).tril().bool())
        return self.head(h)[:-1].log_softmax(-1), self.value(h)[:, 0]

    def answer(self, prompt: list[int], answer: list[int]) -> Tensor:
        """[n] log-probabilities of the answer's tokens."""
        lp, _ = self.of_text(prompt + answer)
        return lp[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None])[:, 0]


def gradients(model: Tiny, loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, retain_graph=True
    )
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(model.named_parameters(), grads, strict=True)
    }


def assert_same(model: Tiny, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-9, atol=1e-9)
    mine, theirs = gradients(model, got), gradients(model, want)
    assert max(g.abs().max() for g in theirs.values()) > 1e-4, "the comparison is of zeros"
    for name in theirs:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


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


# -- bco, KTO, RM, SFT -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("labels", [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1], [0]])
# the KL estimate is positive one way, clamped the other
@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)])
def test_kto_loss_and_gradient(labels: list[int], seeds: tuple[int, int]) -> None:
    policy, reference = Tiny(seeds[0]), Tiny(seeds[1])
    b, wc, wr = 0.3, 1.33, 0.8
    count = range(len(labels))
    ratio = torch.stack(
        [
            policy.answer(PROMPTS[i], CHOSEN[i]).sum()
            - reference.answer(PROMPTS[i], CHOSEN[i]).sum().detach()
            for i in count
        ]
    )
    with torch.no_grad():
        kls = [
            policy.answer(PROMPTS[i], REJECTED[i - 1]).sum()
            - reference.answer(PROMPTS[i], REJECTED[i - 1]).sum()
            for i in count
        ]
        kl = max(0.0, float(sum(kls)) / len(labels))
    want = torch.stack(
        [
            wc * (1 - s(b * (x - kl))) if y else wr * (1 - s(b * (kl - x)))
            for x, y in zip(ratio, labels, strict=True)
        ]
    ).sum()
    want = want + 0.2 * sum(
        -policy.answer(PROMPTS[i], CHOSEN[i]).mean() for i in count if labels[i]
    )
    row = make_row(kto_documents(labels)).padded(8, 0)
    stage = KTOStage(b, wc, wr, ftx=0.2)
    assert stage.count_items(row) == len(labels)
    got, metrics = stage.loss_sum(
        TokenOutputs(policy.of_row(row)[0], reference=reference.of_row(row)[0]), row
    )
    assert_same(policy, got, want)
    assert float(metrics["kl"][0]) == pytest.approx(kl, abs=1e-12)
    sums = MetricSums()
    sums.add(metrics)
    means = sums.means()
    chosen = [b * x.item() for x, y in zip(ratio, labels, strict=True) if y]
    rejected = [b * x.item() for x, y in zip(ratio, labels, strict=True) if not y]
    assert means.get("rewards/chosen") == (
        pytest.approx(sum(chosen) / len(chosen)) if chosen else None
    )
    assert means.get("rewards/rejected") == (
        pytest.approx(sum(rejected) / len(rejected)) if rejected else None
    )
    if chosen and rejected:
        assert means["rewards/margins"] == pytest.approx(
            sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
        )
    assert all(math.isfinite(v) for v in means.values())


def test_kto_kl_is_of_all_groups() -> None:
    """Documents dealt to two groups, all chosen in one and all rejected in the other: losses and
    metrics add up to one group's.
    """
    policy, reference = Tiny(1), Tiny(2)
    labels = [1, 1, 0, 0]

    def run(keep: list[int], dp=None):
        row = make_row([d for d in kto_documents(labels) if d.sample in keep]).padded(8, 0)
        out = TokenOutputs(
            policy.of_row(row)[0].detach(), reference=reference.of_row(row)[0].detach()
        )
        kw = {} if dp is None else {"dp_sum": dp.sum, "dp_rank": dp.rank, "dp_size": dp.size}
        return KTOStage(0.3).loss_sum(out, row, **kw)

    one, metrics = run([0, 1, 2, 3])
    parts = Groups(2).run(lambda rank, dp: run([[0, 1], [2, 3]][rank], dp))
    torch.testing.assert_close(sum(p[0] for p in parts), one, rtol=1e-12, atol=1e-12)
    both, single = MetricSums(), MetricSums()
    single.add(metrics)
    for _, m in parts:
        both.add(m)
    assert both.means() == pytest.approx(single.means())


@pytest.mark.parametrize("shared", [False, True])
def test_reward_model_loss_and_gradient(shared: bool) -> None:
    model, samples = Tiny(3), [0, 1, 2, 3]
    c = torch.stack([model.of_text(PROMPTS[i] + CHOSEN[i])[1][-1] for i in samples])
    r = torch.stack([model.of_text(PROMPTS[i] + REJECTED[i])[1][-1] for i in samples])
    row = pair_row(samples, shared)
    got, metrics = RewardStage().loss_sum(model.of_row(row)[1], row)
    assert_same(model, got, -torch.log(s(c - r)).sum())
    assert RewardStage().count_items(row) == 4
    assert float(metrics["accuracy"][0]) == float((c > r).sum())
    assert float(metrics["rewards/margins"][0] / metrics["rewards/margins"][1]) == pytest.approx(
        (c - r).mean().item()
    )


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_ties_count_one_half(name: str) -> None:
    """Policy = reference: every pair is a tie, whether its margin is 0 or what rounding makes of
    it; a margin beyond that is none.
    """
    row = pair_row([0, 1, 2, 3], False)
    logps, _ = Tiny(1).of_row(row)
    logps = logps.detach().double()
    lengths = {
        d.sample: [e.trained for e in row.documents if e.sample == d.sample]
        for d in row.documents
        if d.role == "chosen"
    }
    first = next(d for d in row.documents if d.role == "chosen" and d.sample == 0)

    def accuracy(change: float, precision: torch.dtype) -> float:
        """`change`: how far the policy is ahead of the reference in the first pair, in
        log-probability of the chosen answer.
        """
        stage = PreferenceStage(name, losses.LossOptions(0.2), precision=precision)
        policy = logps.clone()
        policy[next(t for t in range(first.start, first.stop) if row.labels[t] != IGNORE)] += change
        total, count = stage.loss_sum(TokenOutputs(policy, reference=logps), row)[1][
            "rewards/accuracies"
        ]
        return float(total / count)

    for precision in (torch.float32, torch.bfloat16):
        rounding = torch.finfo(precision).eps * sum(lengths[0]) ** 0.5
        if name == "ipo":  # rewards are means: of chosen and rejected answers of different lengths
            rounding = (
                torch.finfo(precision).eps * sum(1 / n for n in lengths[0]) ** 0.5 * first.trained
            )
        assert (
            accuracy(0.0, precision)
            == accuracy(0.9 * rounding, precision)
            == accuracy(-0.9 * rounding, precision)
            == 0.5
        )
        assert accuracy(1.1 * rounding, precision) == (1 + 3 * 0.5) / 4
        assert accuracy(-1.1 * rounding, precision) == 3 * 0.5 / 4


def test_equal_values_of_a_reward_model_are_a_tie() -> None:
    row = pair_row([0, 1], False)
    values = torch.zeros(len(row), dtype=torch.float64)
    assert float(RewardStage().loss_sum(values, row)[1]["accuracy"][0]) == 1.0
    ends = {(d.sample, d.role): d.stop - 1 for d in row.documents}
    values[ends[0, "chosen"]], values[ends[0, "rejected"]] = 1.0 + 1e-3, 1.0
    assert float(RewardStage().loss_sum(values, row)[1]["accuracy"][0]) == 1.5
    assert (
        float(RewardStage(precision=torch.bfloat16).loss_sum(values, row)[1]["accuracy"][0]) == 1.0
    )


def sft_row() -> Row:
    return make_row([whole(PROMPTS[i], CHOSEN[i]) for i in range(4)]).padded(8, 0)


@pytest.mark.parametrize("loss", ["nll", "dft", "asft", "eaft", "smoothed"])
def test_token_losses(loss: str) -> None:
    model, reference, row = Tiny(4), Tiny(5), sft_row()
    every, tokens, kl, entropy, means, smooth = [], [], [], [], [], []
    for i in range(4):
        lp = model.of_text(PROMPTS[i] + CHOSEN[i])[0][len(PROMPTS[i]) - 1 :]
        ref = reference.of_text(PROMPTS[i] + CHOSEN[i])[0][len(PROMPTS[i]) - 1 :].detach()
        tokens += lp.gather(1, torch.tensor(CHOSEN[i])[:, None])[:, 0]
        kl += F.kl_div(lp, ref.exp(), reduction="none").sum(-1)
        means += lp.mean(-1)
        smooth.append(
            F.cross_entropy(lp, torch.tensor(CHOSEN[i]), reduction="sum", label_smoothing=0.4)
        )
        top = lp.detach().topk(20)[0].log_softmax(-1)
        entropy += -(top.exp() * top).sum(-1)
        every += (lp.argmax(-1) == torch.tensor(CHOSEN[i])).tolist()
    x, k, h, m = (torch.stack(parts) for parts in (tokens, kl, entropy, means))
    want = {
        "smoothed": torch.stack(smooth),
        "nll": -x,
        "dft": -x * x.detach().exp(),
        "asft": -x * x.detach().exp() + 0.4 * k,
        "eaft": -x * (h / 3) ** 0.4,
    }[loss].sum()

    trained = row.labels != IGNORE
    out = TokenOutputs(
        model.of_row(row)[0],  # with noise at untrained positions, which must not count
        top1=torch.ones(len(row), dtype=torch.bool).index_put((trained,), torch.tensor(every)),
        entropy=torch.ones(len(row)).double().masked_scatter(trained, h),
        reference_kl=torch.ones(len(row)).double().masked_scatter(trained, k),
        mean_logp=torch.ones(len(row)).double().masked_scatter(trained, m),
    )
    stage = TokenStage(loss, 0.4, accuracy=True)
    got, metrics = stage.loss_sum(out, row)
    assert_same(model, got, want)
    assert stage.count_items(row) == len(x)
    assert float(metrics["accuracy"][0]) == sum(every) and metrics["accuracy"][1] == len(every)
    if loss == "asft":
        assert float(metrics["kl"][0]) == pytest.approx(
            float(k.detach().sum()), rel=1e-12
        ) and metrics["kl"][1] == len(x)


def llamafactory_losses() -> dict[str, Any]:
    """Functions of the installed package, run by themselves: it refuses to be imported beside this
    transformers.
    """
    try:
        source = Path(
            str(importlib.metadata.distribution("llamafactory").locate_file("llamafactory"))
        )
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llamafactory is not installed")
    names = ("_dft_cross_entropy", "_asft_cross_entropy", "_kl_divergence", "_eaft_cross_entropy")
    tree = ast.parse((source / "train" / "trainer_utils.py").read_text())
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    assert len(tree.body) == len(names)
    space: dict[str, Any] = {"torch": torch, "F": F, "Optional": Optional}
    exec(compile(tree, "trainer_utils", "exec"), space)
    return space


@pytest.mark.parametrize("loss", ["dft", "asft", "eaft"])
def test_token_losses_equal_llamafactory(loss: str) -> None:
    """Its own code on logits, ours on what is made of the same logits: the mean over trained
    tokens, and the gradient.
    """
    theirs = llamafactory_losses()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (20,), generator=generator).tolist()
    row = make_row([TokenizedDocument(ids, [IGNORE] * 7 + ids[7:])])
    z, r = (2 * torch.randn(20, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    want = {
        "dft": lambda: theirs["_dft_cross_entropy"](z, row.labels),
        "asft": lambda: theirs["_asft_cross_entropy"](z, row.labels, r, 0.4),
        "eaft": lambda: theirs["_eaft_cross_entropy"](z, row.labels, alpha=0.4),
    }[loss]()
    lp, top = z.log_softmax(-1), z.detach().topk(20)[0].log_softmax(-1)
    out = TokenOutputs(
        lp.gather(1, row.labels.clamp(min=0)[:, None])[:, 0],
        entropy=-(top.exp() * top).sum(-1),
        reference_kl=(r.softmax(-1) * (r.log_softmax(-1) - lp)).sum(-1),
    )
    total, _ = TokenStage(loss, 0.4).loss_sum(out, row)
    got = total / row.trained_tokens
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("loss", ["asft", "eaft"])
def test_a_missing_vector_is_refused(loss: str) -> None:
    row = sft_row()
    with pytest.raises(UserError, match=r"needs (reference_kl|entropy) from"):
        TokenStage(loss, 0.1).loss_sum(Tiny(4).of_row(row)[0], row)


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


# -- refusals --------------------------------------------------------------------------------------


def arguments(**kw) -> SimpleNamespace:
    base = dict(
        pref_loss="sigmoid",
        pref_beta=0.1,
        pref_ftx=0.0,
        simpo_gamma=0.5,
        dpo_label_smoothing=0.0,
        ld_alpha=None,
        pref_bco_weight=0.0,
        kto_chosen_weight=1.0,
        kto_rejected_weight=1.0,
        use_dft_loss=False,
        use_asft_loss=False,
        asft_alpha=0.1,
        use_eaft_loss=False,
        eaft_alpha=1.0,
        label_smoothing_factor=0.0,
        compute_accuracy=False,
        discopop_tau=0.05,
        precompute_ref_log_probs=False,
        loss_path=None,
        ref_model=None,
        ref_model_adapters=(),
        ref_model_quantization_bit=None,
        finetuning_type="full",
        pissa_init=False,
        init_lora_weights=None,
        rl_loss="clip",
        rl_normalization="token",
        rl_constant_length=None,
        rl_ratio="token",
        rl_clip_low=0.2,
        rl_clip_high=None,
        rl_dual_clip=None,
        rl_is_cap=None,
        rl_kl_beta=0.0,
        teacher_model="teacher",
        distill_loss="forward",
        distill_js_beta=0.5,
        distill_alpha=1.0,
    )
    return SimpleNamespace(**(base | kw))


@pytest.mark.parametrize(
    ("stage", "kw", "message"),
    [
        ("dpo", {"pref_loss": "sigmoyd"}, "sigmoyd is not known. Choose one of sigmoid, hinge"),
        ("dpo", {"pref_loss": "exo_pair"}, "is infinite without dpo_label_smoothing"),
        (
            "dpo",
            {"pref_loss": "hinge", "dpo_label_smoothing": 0.1},
            "has no effect with pref_loss: hinge",
        ),
        ("dpo", {"dpo_label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ("dpo", {"pref_beta": 0.0}, "must be above 0"),
        ("dpo", {"pref_loss": "orpo", "pref_bco_weight": 0.5}, "has none"),
        ("dpo", {"pref_loss": "sft", "ld_alpha": 0.5}, "ld_alpha has no effect"),
        ("sft", {"use_dft_loss": True, "use_eaft_loss": True}, "A run has one loss"),
        ("ppo", {}, "stage: ppo is not known"),
    ],
)
def test_refused_arguments(stage: str, kw: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_stage(stage, arguments(**kw))


def test_facts_of_a_stage_are_those_of_its_class() -> None:
    """What is told before torch is imported is true of what computes."""
    cases = [(name, {}) for name in STAGES]
    cases += [
        ("dpo", {"pref_loss": n, "dpo_label_smoothing": smoothing(n)}) for n in PREFERENCE_FACTS
    ]
    cases += [("sft", {f"use_{n}_loss": True}) for n in ("dft", "asft", "eaft")]
    for name, keys in cases:
        stage, facts = make_stage(name, arguments(**keys)), STAGES[name]
        needs = stage.needs_reference or "reference_kl" in stage.needs
        assert facts.needs_reference(arguments(**keys)) == needs, (name, keys)
        assert (stage.output == "values") == (not facts.reloads_best)


def test_make_stage_passes_every_argument_on() -> None:
    dpo = make_stage(
        "dpo",
        arguments(
            pref_loss="robust",
            pref_beta=0.3,
            pref_ftx=0.2,
            dpo_label_smoothing=0.1,
            ld_alpha=0.4,
            pref_bco_weight=0.6,
        ),
    )
    assert dpo == PreferenceStage("robust", losses.LossOptions(0.3, 0.1, 0.5), 0.2, 0.6, 0.4)
    assert make_stage("dpo", arguments(simpo_gamma=0.9)).options.simpo_gamma == 0.9
    assert make_stage(
        "kto",
        arguments(pref_beta=0.3, kto_chosen_weight=2.0, kto_rejected_weight=3.0, pref_ftx=0.1),
    ) == KTOStage(0.3, 2.0, 3.0, 0.1)
    assert make_stage("sft", arguments(use_asft_loss=True, asft_alpha=0.7)) == TokenStage(
        "asft", 0.7
    )
    assert make_stage(
        "sft", arguments(use_eaft_loss=True, eaft_alpha=0.7, compute_accuracy=True)
    ) == TokenStage("eaft", 0.7, True)
    assert (
        make_stage("pt", arguments()) == TokenStage()
        and make_stage("rm", arguments()) == RewardStage()
    )


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
