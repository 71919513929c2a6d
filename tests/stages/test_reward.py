"""`stage: rm` on rows against a plain loop over single sequences; pairs that are equal."""

from __future__ import annotations

import pytest
import torch

from longfactory.data.row import IGNORE
from longfactory.model.outputs import TokenOutputs
from longfactory.stages import losses
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.reward import RewardStage
from oracles import (
    CHOSEN,
    PROMPTS,
    REJECTED,
    pair_row,
    s,
)
from tiny_stage_model import Tiny, assert_same


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
