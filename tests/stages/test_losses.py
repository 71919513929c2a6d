"""Every loss against TRL's own code on the same log-probabilities, or against its published formula
where TRL has no right version.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from longfactory.config.arguments import GROUPS
from longfactory.config.fields import keys_of
from longfactory.config.loss_facts import PREFERENCE_FACTS
from longfactory.stages import losses
from longfactory.stages.losses import DataParallel, LossOptions
from longfactory.stages.pairs import PairLogps
from oracles import ALONE, AT_START, Accelerator, Groups, example, smoothing, trl_dpo_loss

# TRL's DPOTrainer does not have them; orpo and simpo are compared with its other trainers below.
NOT_IN_TRL = {"kto_pair", "orpo", "simpo"}
TRL_DPO = sorted(losses.PREFERENCE_LOSSES.keys() - NOT_IN_TRL)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRL_DPO)
def test_equals_trl(name: str, seed: int) -> None:
    for beta, scale in ((0.1, 0.3), (0.7, 1.0)):
        pairs, policy, mask = example(seed, scale)
        want = trl_dpo_loss(name, policy, mask, pairs, beta, smoothing(name))
        got = losses.PREFERENCE_LOSSES[name](pairs, LossOptions(beta, smoothing(name)), ALONE)
        assert got.shape == (5,)
        torch.testing.assert_close(got.mean(), want.double(), rtol=1e-6, atol=1e-6)


def test_names_are_those_of_the_key_and_llama_factorys_are_among_them() -> None:
    named = set(get_args(keys_of(GROUPS["method"])["pref_loss"].kind))
    assert (
        named
        == set(losses.PREFERENCE_LOSSES)
        >= {"sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"}
    )


def test_orpo_equals_trl() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    pairs, _, _ = example()
    mean = pairs.per_token()
    stub = SimpleNamespace(beta=0.3, accelerator=Accelerator())
    # beta log sigmoid, in fp32
    ratio = ORPOTrainer.odds_ratio_loss(stub, mean.chosen, mean.rejected)[0]
    want = -mean.chosen - ratio
    torch.testing.assert_close(
        losses.orpo(pairs, LossOptions(0.3), ALONE), want, rtol=1e-6, atol=1e-6
    )


def test_simpo_equals_trl() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    pairs, _, _ = example()
    mean = pairs.per_token()
    stub = SimpleNamespace(
        beta=2.0,
        simpo_gamma=0.7,
        alpha=0.0,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=Accelerator(),
    )
    want = CPOTrainer.cpo_loss(stub, mean.chosen, mean.rejected)[0]
    torch.testing.assert_close(
        losses.simpo(pairs, LossOptions(2.0, simpo_gamma=0.7), ALONE), want, rtol=1e-12, atol=1e-12
    )


def test_kto_pair_equals_its_formula() -> None:
    for seed in range(6):  # both signs of the two KL estimates occur
        p, _, _ = example(seed)
        b = 0.4
        r_c, r_r = (
            (p.chosen - p.chosen_reference).tolist(),
            (p.rejected - p.rejected_reference).tolist(),
        )
        k_c, k_r = max(0.0, sum(r_c) / 5), max(0.0, sum(r_r) / 5)

        def s(z: float) -> float:
            return 1 / (1 + math.exp(-z))

        want = [
            ((1 - s(b * (c - k_r))) + (1 - s(b * (k_c - r)))) / 2
            for c, r in zip(r_c, r_r, strict=True)
        ]
        torch.testing.assert_close(
            losses.kto_pair(p, LossOptions(b), ALONE),
            torch.tensor(want, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )


def test_conservative_dpo_equals_its_formula() -> None:
    p, _, _ = example()
    z = 0.5 * p.margin
    want = -0.9 * torch.log(torch.sigmoid(z)) - 0.1 * torch.log(torch.sigmoid(-z))
    torch.testing.assert_close(
        losses.sigmoid(p, LossOptions(0.5, 0.1), ALONE), want, rtol=1e-12, atol=1e-12
    )


def test_bco_equals_its_formula() -> None:
    p, _, _ = example()
    delta = torch.tensor(0.3, dtype=torch.float64)
    x_c, x_r = 0.5 * (p.chosen - p.chosen_reference), 0.5 * (p.rejected - p.rejected_reference)
    want = -torch.log(torch.sigmoid(x_c - delta)) - torch.log(torch.sigmoid(delta - x_r))
    torch.testing.assert_close(losses.bco(p, LossOptions(0.5), delta), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
def test_kto_equals_trl(labels: list[int]) -> None:
    """TRL's KTOTrainer._compute_loss, with a model that returns given token log-probabilities for
    answers and for kl documents.
    """
    from trl.trainer.kto_trainer import KTOTrainer

    g = torch.Generator().manual_seed(3)
    mask = torch.arange(8) < torch.tensor([3, 8, 1, 5, 2])[:, None]
    policy = -torch.rand(5, 8, generator=g, dtype=torch.float64) * mask
    kl_policy = -torch.rand(5, 8, generator=g, dtype=torch.float64) * mask
    reference = policy.sum(1) + 0.8 * torch.randn(5, generator=g, dtype=torch.float64)
    kl_reference = kl_policy.sum(1) - 0.5 * torch.rand(5, generator=g, dtype=torch.float64)
    zeros = torch.zeros_like(policy)

    self = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl_policy.sum(1),
    )
    completion = F.pad(mask.long(), (1, 0))
    ones = torch.ones_like(completion)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": completion,
        "KL_input_ids": ones,
        "KL_attention_mask": ones,
        "KL_completion_mask": completion,
        "label": torch.tensor(labels),
        "ref_logps": reference,
        "ref_KL_logps": kl_reference,
    }
    out = SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    want = KTOTrainer._compute_loss(self, lambda **_: out, inputs, False)

    kl = (kl_policy.sum(1) - kl_reference).mean().clamp(min=0)
    assert kl > 0
    got = losses.kto(policy.sum(1) - reference, torch.tensor(labels).bool(), kl, 0.3, 1.3, 0.7)
    torch.testing.assert_close(got.mean(), want.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(losses.PREFERENCE_LOSSES))
def test_gradient_by_finite_differences(name: str) -> None:
    p, _, _ = example(1)

    def f(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        q = PairLogps(
            chosen,
            rejected,
            p.chosen_reference,
            p.rejected_reference,
            p.chosen_length,
            p.rejected_length,
        )
        return losses.PREFERENCE_LOSSES[name](q, LossOptions(0.4, smoothing(name)), ALONE)

    if name == "kto_pair":  # its batch terms carry no gradient: compare with them frozen
        k = [r.mean().clamp(min=0) for r in (p.chosen_ratio, p.rejected_ratio)]

        def f(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
            r_c, r_r = chosen - p.chosen_reference, rejected - p.rejected_reference
            return 0.5 * (torch.sigmoid(0.4 * (k[1] - r_c)) + torch.sigmoid(0.4 * (r_r - k[0])))

        c, r = p.chosen.clone().requires_grad_(), p.rejected.clone().requires_grad_()
        q = PairLogps(
            c, r, p.chosen_reference, p.rejected_reference, p.chosen_length, p.rejected_length
        )
        got = torch.autograd.grad(losses.kto_pair(q, LossOptions(0.4), ALONE).sum(), (c, r))
        want = torch.autograd.grad(f(c, r).sum(), (c, r))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        f,
        (p.chosen.clone().requires_grad_(), p.rejected.clone().requires_grad_()),
        eps=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", sorted(AT_START))
def test_policy_equal_to_reference(name: str) -> None:
    """Where the two models are equal every log-ratio is 0, and the loss a known number to the last
    bit (robust: up to its divisions).
    """
    p, _, _ = example(2)
    p = PairLogps(
        p.chosen,
        p.rejected,
        p.chosen.clone(),
        p.rejected.clone(),
        p.chosen_length,
        p.rejected_length,
    )
    got = losses.PREFERENCE_LOSSES[name](p, LossOptions(0.1), ALONE)
    if name in ("sppo_hard", "ipo"):
        torch.testing.assert_close(got, torch.full_like(got, AT_START[name]), rtol=1e-15, atol=0)
    else:
        assert got.tolist() == [AT_START[name]] * 5


@pytest.mark.parametrize("name", sorted(losses.PREFERENCE_LOSSES))
def test_what_a_pair_of_equal_answers_teaches(name: str) -> None:
    """The losses for which such pairs are dropped learn nothing of them. Nor does simpo, whose mean
    is over all pairs all the same.
    """
    x = torch.tensor([-7.0], dtype=torch.float64, requires_grad=True)
    compares = PREFERENCE_FACTS[name].reference
    reference = torch.tensor([-6.0], dtype=torch.float64) if compares else None
    n = torch.tensor([5.0], dtype=torch.float64)
    smoothing = 0.1 if name == "exo_pair" else 0.0
    pairs = PairLogps(x, x, reference, reference, n, n)
    loss = losses.PREFERENCE_LOSSES[name](pairs, LossOptions(0.1, smoothing), ALONE)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    if PREFERENCE_FACTS[name].difference:
        assert gradient.item() == 0.0
    # the last three compare with other pairs of the batch
    elif name not in ("simpo", "aot", "aot_unpaired", "kto_pair"):
        assert gradient.abs().item() > 1e-4


def test_log_odds_near_both_ends() -> None:
    logp = torch.tensor(
        [-1e-9, -1e-3, -0.6931, -0.6932, -5.0, -80.0], dtype=torch.float64, requires_grad=True
    )
    x = losses.log_odds(logp)
    exact = [-math.log(math.expm1(-v)) for v in logp.tolist()]  # log(p/(1-p)) = -log(1/p - 1)
    torch.testing.assert_close(x, torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    (g,) = torch.autograd.grad(x.sum(), logp)
    torch.testing.assert_close(g, -1 / torch.expm1(logp.detach()), rtol=1e-9, atol=0)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(losses.log_odds(certain).sum(), certain)[0]).all()


def cut(p: PairLogps, s: slice) -> PairLogps:
    return PairLogps(
        p.chosen[s],
        p.rejected[s],
        p.chosen_reference[s],
        p.rejected_reference[s],
        p.chosen_length[s],
        p.rejected_length[s],
    )


@pytest.mark.parametrize("name", sorted(losses.PREFERENCE_LOSSES))
def test_batch_dealt_to_groups(name: str) -> None:
    """Five pairs over three groups (2, 0, 3): the losses and gradients add up to those of one
    group.
    """
    o = LossOptions(0.4, smoothing(name))
    p, _, _ = example(4)
    p.chosen.requires_grad_(), p.rejected.requires_grad_()
    want = losses.PREFERENCE_LOSSES[name](p, o, ALONE).sum()
    want_grad = torch.autograd.grad(want, (p.chosen, p.rejected), allow_unused=True)

    parts = [slice(0, 2), slice(2, 2), slice(2, 5)]

    def group(rank: int, dp: DataParallel):
        q, _, _ = example(4)
        q.chosen.requires_grad_(), q.rejected.requires_grad_()
        total = losses.PREFERENCE_LOSSES[name](cut(q, parts[rank]), o, dp).sum()
        return total.detach(), torch.autograd.grad(total, (q.chosen, q.rejected), allow_unused=True)

    results = Groups(3).run(group)
    torch.testing.assert_close(sum(r[0] for r in results), want.detach(), rtol=1e-12, atol=1e-12)
    for i in range(2):
        if want_grad[i] is None:
            assert all(r[1][i] is None for r in results)
        else:
            torch.testing.assert_close(
                sum(r[1][i] for r in results), want_grad[i], rtol=1e-12, atol=1e-12
            )


def test_gather_notices_a_wrong_group_count() -> None:
    with pytest.raises(RuntimeError, match="adds up 1 groups, but there are 2"):
        DataParallel(lambda x: x, 0, 2).gather(torch.ones(2))
