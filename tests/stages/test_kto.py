"""`stage: kto` on rows against a plain loop over single sequences."""

from __future__ import annotations

import math

import pytest
import torch

from longfactory.data.row import make_row
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.kto import KTOStage
from longfactory.stages.metrics import MetricSums
from oracles import (
    CHOSEN,
    PROMPTS,
    REJECTED,
    Groups,
    kto_documents,
    s,
)
from tiny_stage_model import Tiny, assert_same


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
