"""Preference losses: the log-probabilities of P pairs in, one number a pair out. Pure functions of
a few numbers, no models, no rows.

Everything is float64 and on whatever device the log-probabilities are. Notation of the docstrings:
h = (chosen - chosen_reference) - (rejected - rejected_reference), b = beta, e = label smoothing, s
= the logistic function, x_c and x_r = b times one side's log-ratio.

Most losses are sums over pairs and know nothing of other pairs. Four compare a pair with its
*batch* (kto_pair, aot, aot_unpaired, sft): the batch is then this micro-batch over all
data-parallel groups, so that the loss does not depend on how pairs are dealt to groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.config.loss_facts import PREFERENCE_FACTS
from longfactory.errors import UserError
from longfactory.stages.pairs import PairLogps


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The numbers of a preference loss that a user sets."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05

    @classmethod
    def of(cls, args: FinetuningArguments) -> LossOptions:
        """Those of a run, from its `FinetuningArguments`."""
        return cls(args.pref_beta, args.dpo_label_smoothing, args.simpo_gamma, args.discopop_tau)


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """The data-parallel groups, as far as a loss may know them. By default there is one.

    `sum` adds a tensor over the groups and returns the total to each; no gradient passes. Every
    group calls it equally often, whatever its rows hold.
    """

    sum: Callable[[Tensor], Tensor] = lambda x: x
    rank: int = 0
    size: int = 1

    def gather(self, x: Tensor) -> tuple[Tensor, int]:
        """[P of this group] -> [P of all groups] in the groups' order, and where this group's own
        entries begin.

        Its own entries are differentiable, the others constant.
        """
        if self.size == 1:
            return x, 0
        counts = x.new_zeros(self.size + 1)
        counts[self.rank] = x.shape[0]
        counts[-1] = 1
        *sizes, groups = (round(n) for n in self.sum(counts).tolist())
        if groups != self.size:
            raise RuntimeError(
                f"The sum over data-parallel groups adds up {groups} groups, but there are"
                f" {self.size}."
            )
        start = sum(sizes[: self.rank])
        stop = start + x.shape[0]
        everyone = x.new_zeros(sum(sizes))
        everyone[start:stop] = x.detach()
        everyone = self.sum(everyone)
        return torch.cat([everyone[:start], x, everyone[stop:]]), start


def _smoothed(z: Tensor, e: float) -> Tensor:
    """-(1-e) log s(z) - e log s(-z)"""
    return -F.logsigmoid(z) if e == 0 else -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def sigmoid(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """DPO (arXiv 2305.18290); with label smoothing conservative DPO: -(1-e) log s(b h) - e log s(-b
    h).
    """
    return _smoothed(o.beta * p.margin, o.label_smoothing)


def hinge(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """SLiC (arXiv 2309.06657): max(0, 1 - b h)."""
    return torch.relu(1 - o.beta * p.margin)


def ipo(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (h - 1/(2b))^2 with h of means per trained token, as its
    authors ran it.
    """
    return (p.per_token().margin - 1 / (2 * o.beta)) ** 2


def sigmoid_norm(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """DPO on means per trained token (Tulu 3, arXiv 2411.15124): -log s(b h), h of means."""
    return -F.logsigmoid(o.beta * p.per_token().margin)


def kto_pair(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """KTO on pairs (arXiv 2402.01306): the mean of 1 - s(b (r_c - K_r)) and 1 - s(b (K_c - r_r)), r
    the log-ratios.

    K = max(0, mean of one side's log-ratios over the batch), each side measured against the
    other's. No gradient passes through K, as the paper asks (TRL, which had this loss until 0.8,
    let it pass).
    """
    r_c, r_r = p.chosen_ratio, p.rejected_ratio
    total = dp.sum(
        torch.stack([r_c.detach().sum(), r_r.detach().sum(), r_c.new_tensor(float(r_c.shape[0]))])
    )
    k_c, k_r = (total[:2] / total[2].clamp(min=1)).clamp(min=0)
    return 0.5 * (
        (1 - torch.sigmoid(o.beta * (r_c - k_r))) + (1 - torch.sigmoid(o.beta * (k_c - r_r)))
    )


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a probability given as its logarithm, without cancellation on either side
    of p = 1/2.
    """
    logp = logp.clamp(max=-1e-12)  # p = 1 has infinite odds and no gradient
    low = logp < -math.log(2)
    # Each branch is fed only arguments that it likes: an infinite gradient in the branch not taken
    # would become NaN.
    far = torch.log1p(-torch.exp(torch.where(low, logp, torch.full_like(logp, -1.0))))
    near = torch.log(-torch.expm1(torch.where(low, torch.full_like(logp, -0.5), logp)))
    return logp - torch.where(low, far, near)


def odds_ratio(p: PairLogps) -> Tensor:
    """ORPO's second term, -log s(log odds(chosen) - log odds(rejected)), of means per trained
    token.
    """
    m = p.per_token()
    return -F.logsigmoid(log_odds(m.chosen) - log_odds(m.rejected))


def orpo(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """ORPO (arXiv 2403.07691): -mean logp of the chosen answer + b times the odds ratio term. No
    reference.
    """
    return -p.per_token().chosen + o.beta * odds_ratio(p)


def simpo(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """SimPO (arXiv 2405.14734): -log s(b (chosen - rejected) - gamma) of means per trained token.
    No reference.
    """
    m = p.per_token()
    return -F.logsigmoid(o.beta * (m.chosen - m.rejected) - o.simpo_gamma)


def exo_pair(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """EXO on pairs (arXiv 2402.00856, eq. 16): KL between (s(b h), s(-b h)) and (1-e, e); needs e >
    0.
    """
    z = o.beta * p.margin
    return torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-o.label_smoothing)) + torch.sigmoid(
        -z
    ) * (F.logsigmoid(-z) - math.log(o.label_smoothing))


def nca_pair(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """NCA on pairs (arXiv 2402.05369): -log s(x_c) - log s(-x_c)/2 - log s(-x_r)/2."""
    x_c, x_r = o.beta * p.chosen_ratio, o.beta * p.rejected_ratio
    return -F.logsigmoid(x_c) - 0.5 * F.logsigmoid(-x_c) - 0.5 * F.logsigmoid(-x_r)


def robust(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """Robust DPO (arXiv 2403.00409): (-(1-e) log s(b h) + e log s(-b h)) / (1 - 2e)."""
    z, e = o.beta * p.margin, o.label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def bco_pair(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """TRL's pairwise BCO without reward shift: -log s(x_c) - log s(-x_r). `bco` is the one with the
    shift.
    """
    return bco(p, o, torch.zeros((), dtype=p.chosen.dtype, device=p.chosen.device))


def bco(p: PairLogps, o: LossOptions, delta: Tensor) -> Tensor:
    """Binary classifier optimisation (arXiv 2404.04656): -log s(x_c - delta) - log s(-(x_r -
    delta)), delta the running mean reward.
    """
    return -F.logsigmoid(o.beta * p.chosen_ratio - delta) - F.logsigmoid(
        -(o.beta * p.rejected_ratio - delta)
    )


def sppo_hard(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675): (r_c - 1/(2b))^2 + (r_r + 1/(2b))^2."""
    return (p.chosen_ratio - 0.5 / o.beta) ** 2 + (p.rejected_ratio + 0.5 / o.beta) ** 2


def _transport(first: Tensor, second: Tensor, o: LossOptions, dp: DataParallel) -> Tensor:
    """Losses of the differences of two sorted batches, this group's share of them.

    Every group sorts the whole batch and computes all terms, with gradient only to its own entries:
    added over the groups that is the gradient of the sum. The value is the group's share by the
    place of its `first` entries.
    """
    all_first, start = dp.gather(first)
    all_second, _ = dp.gather(second)
    a, order = torch.sort(all_first, stable=True)
    losses = _smoothed(o.beta * (a - torch.sort(all_second, stable=True)[0]), o.label_smoothing)
    n = first.shape[0]
    if dp.size == 1 or n == 0:
        return losses[:n]
    total = losses.sum()
    return losses.detach()[(order >= start) & (order < start + n)] + (total - total.detach()) / n


def aot(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """Distributional alignment by optimal transport (arXiv 2406.05882): the batch's sorted chosen -
    rejected of the policy against the sorted ones of the reference."""
    if p.chosen_reference is None or p.rejected_reference is None:
        raise UserError("pref_loss: aot needs reference log-probabilities.")
    return _transport(p.chosen - p.rejected, p.chosen_reference - p.rejected_reference, o, dp)


def aot_unpaired(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """The same paper's unpaired form: the batch's sorted chosen log-ratios against its sorted
    rejected ones.
    """
    return _transport(p.chosen_ratio, p.rejected_ratio, o, dp)


def apo_zero(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """APO (arXiv 2408.06266, eq. 7), for chosen answers better than the model's own: (1 - s(x_c)) +
    s(x_r).
    """
    return 1 - torch.sigmoid(o.beta * p.chosen_ratio) + torch.sigmoid(o.beta * p.rejected_ratio)


def apo_down(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """APO (eq. 8), for chosen answers worse than the model's own: s(x_c) + (1 - s(b h))."""
    return torch.sigmoid(o.beta * p.chosen_ratio) + 1 - torch.sigmoid(o.beta * p.margin)


def discopop(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): m exp(-z) - (1 - m) log s(z), z = b h, m = s(z / tau)."""
    z = o.beta * p.margin
    m = torch.sigmoid(z / o.discopop_tau)
    return -F.logsigmoid(z) * (1 - m) + torch.exp(-z) * m


def sft(p: PairLogps, o: LossOptions, dp: DataParallel) -> Tensor:
    """Minus the mean log-probability of the chosen answers' tokens, every token of the batch
    weighing the same. No reference.
    """
    pairs, tokens = dp.sum(
        torch.stack([p.chosen.new_tensor(float(p.chosen.shape[0])), p.chosen_length.sum()])
    )
    return -p.chosen * (pairs / tokens.clamp(min=1))


PreferenceLoss = Callable[[PairLogps, LossOptions, DataParallel], Tensor]

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {name: globals()[name] for name in PREFERENCE_FACTS}
"""Every loss of a pair that `config/loss_facts.py` has a line for, by its name."""


def kto(
    ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    chosen_weight: float,
    rejected_weight: float,
) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 7): w_c (1 - s(b (r - kl))) for desirable answers, w_r (1 - s(b
    (kl - r))) for the others.

    Args:
        ratio: [K] log-ratios of the answers, policy - reference.
        desirable: [K] bool.
        kl: the batch's estimate of KL(policy || reference), >= 0, without gradient.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(ratio)
    weight = torch.where(
        desirable, torch.full_like(ratio, chosen_weight), torch.full_like(ratio, rejected_weight)
    )
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - kl)))
