"""`stage: distill`: divergences are the formulas in float64 over the whole vocabulary, and TRL's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.distill import DistillStage, divergence, with_rest

V = 11


def logits(seed: int, n: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, V, generator=g, dtype=torch.float64)


KINDS = [("forward", 0.5), ("reverse", 0.5), ("js", 0.5), ("js", 0.1)]


def formula(p: Tensor, q: Tensor, kind: str, beta: float) -> Tensor:
    """[...] of distributions [..., V], the teacher's p and the model's q."""
    m = beta * p + (1 - beta) * q
    return {
        "forward": (p * (p / q).log()).sum(-1),
        "reverse": (q * (q / p).log()).sum(-1),
        "js": beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1),
    }[kind]


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergences_over_the_vocabulary(kind: str, beta: float) -> None:
    p, q = logits(1).softmax(-1), logits(2).softmax(-1)
    want = formula(p, q, kind, beta)
    got = divergence(p.log(), q.log(), kind, beta)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_what_is_not_stored_counts_as_one_entry(kind: str, beta: float) -> None:
    """The divergence of the distributions over the four stored entries and all others; with its
    gradient.
    """
    teacher = logits(1).log_softmax(-1)
    ids = teacher.topk(4).indices
    rows = []
    for whole in (teacher, logits(2).log_softmax(-1)):
        kept = whole.gather(1, ids)
        rest = (1 - kept.exp().sum(-1, keepdim=True)).log()
        rows.append(torch.cat([kept, rest], -1))
    torch.testing.assert_close(with_rest(teacher.gather(1, ids)), rows[0], rtol=1e-12, atol=1e-12)
    a, b = logits(2).requires_grad_(), logits(2).requires_grad_()
    got = divergence(
        with_rest(teacher.gather(1, ids)),
        with_rest(a.log_softmax(-1).gather(1, ids)),
        kind,  # type: ignore[arg-type]
        beta,
    )
    others = torch.ones(7, V, dtype=torch.bool).scatter(1, ids, False)
    own = b.softmax(-1)
    q = torch.cat([own.gather(1, ids), (own * others).sum(-1, keepdim=True)], -1)
    want = formula(rows[0].exp(), q, kind, beta)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_with_every_entry_it_is_trls(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = logits(2)[None], logits(1)[None]
    labels = torch.ones(1, 7, dtype=torch.int64)
    want = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta)
    each = divergence(teacher[0].log_softmax(-1), student[0].log_softmax(-1), "js", beta)
    torch.testing.assert_close(each.mean(), want, rtol=1e-6, atol=1e-9)


def row_and_outputs() -> tuple[Row, TokenOutputs, Tensor, Tensor]:
    labels = [IGNORE, IGNORE, 5, 6, IGNORE, 7]
    teacher = logits(1, 6).log_softmax(-1)
    top = teacher.topk(3)
    # numbers stand at the token that they are of
    numbers = {"teacher_ids": top.indices.numpy(), "teacher_logp": top.values.numpy()}
    row = make_row([TokenizedDocument([1, 2, 5, 6, 4, 7], labels, numbers=numbers)]).padded(8, 0)
    own = logits(2, 8).log_softmax(-1)
    ids = row.numbers["teacher_ids"]
    out = TokenOutputs(
        own.gather(1, row.labels.clamp(min=0)[:, None])[:, 0], candidates=own.gather(1, ids)
    )
    return row, out, top.values, own


def test_the_loss_of_a_row() -> None:
    row, out, teacher, own = row_and_outputs()
    stage = DistillStage("forward", alpha=0.7)
    got, metrics = stage.loss_sum(out, row)
    want = torch.zeros((), dtype=torch.float64)
    for at in (1, 2, 4):  # predicts token at + 1
        p = with_rest(teacher[at + 1][None])
        q = with_rest(own[at].gather(0, row.numbers["teacher_ids"][at])[None])
        want += 0.7 * (p.exp() * (p - q)).sum() - 0.3 * own[at, row.labels[at]]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert stage.count_items(row) == 3 and metrics["divergence"][1] == 3
    mass = float(teacher[[2, 3, 5]].exp().sum())
    assert float(metrics["teacher_mass"][0]) == pytest.approx(mass)


def test_without_the_teachers_numbers_it_is_an_error() -> None:
    row, out, _, _ = row_and_outputs()
    row.numbers.clear()
    with pytest.raises(UserError, match="without the teacher's numbers"):
        DistillStage().loss_sum(out, row)
