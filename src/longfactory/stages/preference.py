"""The stages: what is summed over a row, and what is counted. Single-device code that never hears
of sequence parallelism.

A stage receives the row's token log-probabilities (or values) in natural order, whole, on every
rank of a sequence-parallel group, and returns the *sum* of its items' losses. The trainer
differentiates `DP * loss_sum / N`, N the items of the whole optimizer step; so every loss is the
exact mean over the step, however items are dealt to micro-batches and groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from longfactory.data.row import IGNORE, Row
from longfactory.errors import ConfigError, UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages import losses
from longfactory.stages.losses import DataParallel, LossOptions
from longfactory.stages.metrics import Metrics
from longfactory.stages.pairs import (
    PairLogps,
    document_logps,
    document_sums,
    find_pairs,
    of_role,
    pick,
    reference_logps,
)


def alone(x: Tensor) -> Tensor:
    """The sum over data-parallel groups when there is one."""
    return x


class Stage(Protocol):
    output: Literal["logps", "values"]
    """What the head must give: log-probabilities of the labels, or the value head's numbers."""
    ld_alpha: float | None
    """How `document_logps` weighs tokens; what is computed before training must be computed with
    the same.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether `loss_sum` wants reference log-probabilities: `TokenOutputs.reference`, or a
        number on each document.
        """
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `TokenOutputs` beside `logps` that must be made."""
        ...

    def count_items(self, row: Row) -> int:
        """Number of items in the row. Known on the host."""
        ...

    def loss_sum(
        self,
        x: Tensor | TokenOutputs,
        row: Row,
        *,
        dp_sum: Callable[[Tensor], Tensor] = alone,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> tuple[Tensor, Metrics]:
        """The sum of the items' losses (float64, attached to the graph also where there is no item)
        and the metrics.

        Args:
            x: [T] in natural order, or `TokenOutputs` of such vectors.
            row: on the device of `x`.
            dp_sum: adds a tensor over the data-parallel groups, without gradient. Called equally
                often for every row.
        """
        ...

    def state_dict(self) -> dict[str, list[float]]:
        """What the stage has learnt of the run so far, for a checkpoint; the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, list[float]]) -> None: ...


class Stateless:
    """A stage that remembers nothing between rows."""

    def state_dict(self) -> dict[str, list[float]]:
        return {}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        return None


def as_outputs(x: Tensor | TokenOutputs) -> TokenOutputs:
    """[T] log-probabilities alone, or with what else the output layer made of each token."""
    return x if isinstance(x, TokenOutputs) else TokenOutputs(logps=x)


def _sum(x: Tensor) -> Tensor:
    return x.detach().sum(dtype=torch.float64)


def wins(chosen: Tensor, rejected: Tensor, noise: Tensor) -> Tensor:
    """The number of pairs whose chosen side is ahead. One that is ahead by no more than `noise` is
    a tie, and counts one half.
    """
    ahead = (chosen - rejected).detach()
    return torch.where(ahead.abs() <= noise, 0.5, (ahead > 0).to(torch.float64)).sum(
        dtype=torch.float64
    )


def mean_logits(out: TokenOutputs, row: Row, roles: dict[str, list[int]]) -> Metrics:
    """`logits/chosen` and the like: the mean logit over the vocabulary and the trained tokens of
    these documents, as TRL reports it.
    """
    if out.mean_logit is None:
        return {}
    sums = document_sums(out.mean_logit, row)
    return {
        f"logits/{role}": (pick(sums, of).sum(), float(sum(row.documents[i].trained for i in of)))
        for role, of in roles.items()
    }


@dataclasses.dataclass
class TokenStage(Stateless):
    """Pretraining and supervised fine-tuning. An item is a trained token.

    `loss` is one of nll: -logp; dft: -p logp with p constant (arXiv 2508.05629); asft: dft + alpha
    KL(reference || policy) over the vocabulary, as LLaMA-Factory defines it (arXiv 2509.23753);
    eaft: -(H/3)^alpha logp, H the entropy of the 20 most probable tokens (as in LLaMA-Factory).
    """

    loss: Literal["nll", "dft", "asft", "eaft"] = "nll"
    alpha: float = 0.0
    accuracy: bool = False
    output: Literal["logps", "values"] = "logps"
    ld_alpha: float | None = None
    needs_reference: bool = False

    @property
    def needs(self) -> frozenset[str]:
        extra = {"asft": {"reference_kl"}, "eaft": {"entropy"}}.get(self.loss, set())
        return frozenset(extra | ({"top1"} if self.accuracy else set()))

    def count_items(self, row: Row) -> int:
        return row.trained_tokens

    def loss_sum(
        self,
        x: Tensor | TokenOutputs,
        row: Row,
        *,
        dp_sum: Callable[[Tensor], Tensor] = alone,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> tuple[Tensor, Metrics]:
        out = as_outputs(x)
        missing = [name for name in sorted(self.needs) if getattr(out, name) is None]
        if missing:
            raise UserError(
                f"The {self.loss} loss needs {', '.join(missing)} from the output layer, which did"
                " not make it."
            )
        trained = row.labels != IGNORE
        metrics: Metrics = {}
        losses_ = -out.logps
        if self.loss in ("dft", "asft"):
            losses_ = losses_ * out.logps.detach().exp()
        if self.loss == "asft" and out.reference_kl is not None:
            losses_ = losses_ + self.alpha * out.reference_kl
            metrics["kl"] = (
                _sum(torch.where(trained, out.reference_kl, 0.0)),
                float(row.trained_tokens),
            )
        if self.loss == "eaft" and out.entropy is not None:
            losses_ = losses_ * (out.entropy.detach() / 3.0) ** self.alpha
        if self.accuracy and out.top1 is not None:
            metrics["accuracy"] = (_sum(out.top1 & trained), float(row.trained_tokens))
        return (
            torch.where(trained, losses_, torch.zeros_like(losses_)).sum(dtype=torch.float64),
            metrics,
        )


@dataclasses.dataclass
class PreferenceStage:
    """Direct preference optimisation and its kin. An item is a pair.

    The loss of a pair is `pref_loss`; with `bco_weight` w it is (loss + w bco) / (1 + w); then
    `ftx` times minus the chosen answer's mean log-probability is added. The reward shift of bco is
    the running mean of the rewards of all pairs seen in training, over all data-parallel groups; it
    is state, and belongs into a checkpoint (`state_dict`).
    """

    pref_loss: str = "sigmoid"
    options: LossOptions = dataclasses.field(default_factory=LossOptions)
    ftx: float = 0.0
    bco_weight: float = 0.0
    ld_alpha: float | None = None
    precision: torch.dtype = torch.float32
    """In which log-probabilities are computed: a margin below its rounding is a tie."""
    output: Literal["logps", "values"] = "logps"
    needs: frozenset[str] = frozenset({"mean_logit"})
    # [2]: sum of rewards, number of rewards
    _rewards: Tensor | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        o = self.options
        if self.pref_loss not in losses.PREFERENCE_LOSSES:
            raise ConfigError(
                f"pref_loss: {self.pref_loss} is not known. Choose one of"
                f" {', '.join(losses.PREFERENCE_LOSSES)}."
            )
        if o.beta <= 0:
            raise ConfigError(f"pref_beta must be above 0, not {o.beta}.")
        if o.label_smoothing and self.pref_loss not in losses.SMOOTHED:
            raise ConfigError(
                f"dpo_label_smoothing means nothing to pref_loss: {self.pref_loss}. It is read by"
                f" {', '.join(sorted(losses.SMOOTHED))}."
            )
        if not 0 <= o.label_smoothing < 0.5:
            raise ConfigError(f"dpo_label_smoothing must lie in [0, 0.5), not {o.label_smoothing}.")
        if self.pref_loss == "exo_pair" and o.label_smoothing == 0:
            raise ConfigError(
                "pref_loss: exo_pair needs dpo_label_smoothing above 0 (its paper uses 0.001): at 0"
                " the loss is infinite."
            )
        if self.bco_weight and not self.needs_reference:
            raise ConfigError(
                f"pref_bco_weight compares with a reference, and pref_loss: {self.pref_loss} has"
                " none. Remove one of them."
            )
        if self.ld_alpha is not None and self.pref_loss == "sft":
            raise ConfigError("ld_alpha means nothing to pref_loss: sft. Remove it.")

    @property
    def needs_reference(self) -> bool:
        return self.pref_loss not in losses.REFERENCE_FREE

    def count_items(self, row: Row) -> int:
        return len(of_role(row, "chosen"))

    def pair_logps(self, out: TokenOutputs, row: Row) -> PairLogps:
        """The row's pairs: sums per document, weighed by `ld_alpha`."""
        pairs = find_pairs(row)
        chosen, rejected = [c for c, _ in pairs], [r for _, r in pairs]
        sums = document_logps(out.logps, row, self.ld_alpha)
        c_ref = r_ref = None
        if self.needs_reference:
            both = reference_logps(out.reference, row, chosen + rejected, sums, self.ld_alpha)
            c_ref, r_ref = both[: len(pairs)], both[len(pairs) :]
        lengths = torch.tensor(
            [float(row.documents[i].trained) for i in chosen + rejected],
            dtype=torch.float64,
            device=sums.device,
        )
        return PairLogps(
            pick(sums, chosen),
            pick(sums, rejected),
            c_ref,
            r_ref,
            lengths[: len(pairs)],
            lengths[len(pairs) :],
        )

    def loss_sum(
        self,
        x: Tensor | TokenOutputs,
        row: Row,
        *,
        dp_sum: Callable[[Tensor], Tensor] = alone,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> tuple[Tensor, Metrics]:
        out, dp = as_outputs(x), DataParallel(dp_sum, dp_rank, dp_size)
        p = self.pair_logps(out, row)
        loss = losses.PREFERENCE_LOSSES[self.pref_loss](p, self.options, dp)
        if self.bco_weight:
            loss = (
                loss + self.bco_weight * losses.bco(p, self.options, self._reward_shift(p, dp))
            ) / (1 + self.bco_weight)
        nll = -p.chosen / p.chosen_length.clamp(min=1)
        if self.ftx:
            loss = loss + self.ftx * nll

        seen = p.per_token() if self.pref_loss in losses.PER_TOKEN else p
        n, beta = float(p.chosen.shape[0]), self.options.beta
        chosen, rejected = beta * seen.chosen_ratio.detach(), beta * seen.rejected_ratio.detach()
        metrics: Metrics = {
            "rewards/chosen": (chosen.sum(), n),
            "rewards/rejected": (rejected.sum(), n),
            "rewards/accuracies": (wins(chosen, rejected, beta * self.noise(p)), n),
            "rewards/margins": ((chosen - rejected).sum(), n),
            "logps/chosen": (_sum(seen.chosen), n),
            "logps/rejected": (_sum(seen.rejected), n),
            **mean_logits(out, row, {role: of_role(row, role) for role in ("chosen", "rejected")}),
        }
        if self.pref_loss == "orpo":
            metrics["odds_ratio_loss"] = (_sum(losses.odds_ratio(p)), n)
        if self.pref_loss == "orpo" or self.ftx:
            metrics["sft_loss"] = (_sum(nll), n)
        return loss.sum(), metrics

    def noise(self, p: PairLogps) -> Tensor:
        """[P] margins that rounding alone can make: an error of the precision's epsilon in the
        log-probability of each trained token, which is of the order of 1, adds up over n tokens to
        sqrt(n) of it."""
        tokens = p.chosen_length.clamp(min=1), p.rejected_length.clamp(min=1)
        if self.pref_loss in losses.PER_TOKEN:
            tokens = 1 / tokens[0], 1 / tokens[1]
        return torch.finfo(self.precision).eps * torch.sqrt(tokens[0] + tokens[1])

    def _reward_shift(self, p: PairLogps, dp: DataParallel) -> Tensor:
        """The running mean of the rewards, this micro-batch included. Evaluation reads it and
        leaves it alone.
        """
        rewards = self.options.beta * torch.cat([p.chosen_ratio, p.rejected_ratio]).detach()
        batch = dp.sum(torch.stack([rewards.sum(), rewards.new_tensor(float(rewards.shape[0]))]))
        before = torch.zeros_like(batch) if self._rewards is None else self._rewards.to(batch)
        if torch.is_grad_enabled():
            self._rewards = before = before + batch
        return before[0] / before[1].clamp(min=1)

    def state_dict(self) -> dict[str, list[float]]:
        return {} if self._rewards is None else {"rewards": self._rewards.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._rewards = (
            torch.tensor(state["rewards"], dtype=torch.float64) if "rewards" in state else None
        )


@dataclasses.dataclass
class KTOStage(Stateless):
    """KTO. An item is a labelled answer; documents of role "kl" (a prompt with another prompt's
    answer) only estimate the KL term.

    kl = max(0, mean over the micro-batch of all data-parallel groups of log policy - log reference
    of the kl documents), constant. A micro-batch without an answer of one label is an ordinary
    batch. `ftx` adds that many times minus the mean log-probability of each desirable answer.
    """

    beta: float = 0.1
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    ftx: float = 0.0
    output: Literal["logps", "values"] = "logps"
    needs_reference: bool = True
    needs: frozenset[str] = frozenset({"mean_logit"})
    ld_alpha: float | None = None

    def count_items(self, row: Row) -> int:
        return len(of_role(row, "chosen")) + len(of_role(row, "rejected"))

    def loss_sum(
        self,
        x: Tensor | TokenOutputs,
        row: Row,
        *,
        dp_sum: Callable[[Tensor], Tensor] = alone,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> tuple[Tensor, Metrics]:
        out = as_outputs(x)
        sums = document_logps(out.logps, row)
        chosen, rejected, other = (
            of_role(row, "chosen"),
            of_role(row, "rejected"),
            of_role(row, "kl"),
        )
        answers = chosen + rejected
        reference = reference_logps(out.reference, row, answers + other, sums, None)
        ratio = pick(sums, answers) - reference[: len(answers)]
        kl_ratio = pick(sums.detach(), other) - reference[len(answers) :]
        total = dp_sum(torch.stack([kl_ratio.sum(), kl_ratio.new_tensor(float(len(other)))]))
        kl = (total[0] / total[1].clamp(min=1)).clamp(min=0)

        desirable = torch.arange(len(answers), device=sums.device) < len(chosen)
        loss = losses.kto(
            ratio, desirable, kl, self.beta, self.chosen_weight, self.rejected_weight
        ).sum()
        n_chosen, n_rejected = float(len(chosen)), float(len(rejected))
        rewards, logps = self.beta * ratio.detach(), pick(sums.detach(), answers)
        metrics: Metrics = {
            "rewards/chosen": (rewards[: len(chosen)].sum(), n_chosen),
            "rewards/rejected": (rewards[len(chosen) :].sum(), n_rejected),
            "logps/chosen": (logps[: len(chosen)].sum(), n_chosen),
            "logps/rejected": (logps[len(chosen) :].sum(), n_rejected),
            **mean_logits(out, row, {"chosen": chosen, "rejected": rejected}),
            "kl": (kl, 1.0),
        }
        if self.ftx:
            lengths = torch.tensor(
                [float(max(row.documents[i].trained, 1)) for i in chosen],
                dtype=torch.float64,
                device=sums.device,
            )
            nll = (-pick(sums, chosen) / lengths).sum()
            loss = loss + self.ftx * nll
            metrics["sft_loss"] = (nll.detach(), n_chosen)
        return loss, metrics


@dataclasses.dataclass
class RewardStage(Stateless):
    """Reward model (Bradley-Terry): -log s(v_c - v_r), v the value head at an answer's last token.
    An item is a pair.
    """

    output: Literal["logps", "values"] = "values"
    needs_reference: bool = False
    needs: frozenset[str] = frozenset()
    ld_alpha: float | None = None
    precision: torch.dtype = torch.float32

    def count_items(self, row: Row) -> int:
        return len(of_role(row, "chosen"))

    def loss_sum(
        self,
        x: Tensor | TokenOutputs,
        row: Row,
        *,
        dp_sum: Callable[[Tensor], Tensor] = alone,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> tuple[Tensor, Metrics]:
        values = as_outputs(x).logps.to(torch.float64)
        pairs = find_pairs(row)
        chosen = pick(values, [row.documents[c].stop - 1 for c, _ in pairs])
        rejected = pick(values, [row.documents[r].stop - 1 for _, r in pairs])
        loss = -torch.nn.functional.logsigmoid(chosen - rejected)
        n = float(len(pairs))
        noise = torch.finfo(self.precision).eps * torch.maximum(
            chosen.detach().abs(), rejected.detach().abs()
        )
        return loss.sum(), {
            "accuracy": (wins(chosen, rejected, noise), n),
            "rewards/chosen": (_sum(chosen), n),
            "rewards/rejected": (_sum(rejected), n),
            "rewards/margins": (_sum(chosen - rejected), n),
        }


def make_stage(stage: str, args: Any, precision: torch.dtype = torch.float32) -> Stage:
    """The stage that a configuration names.

    Args:
        stage: pt, sft, rm, dpo or kto.
        args: anything with the attributes pref_loss, pref_beta, pref_ftx, simpo_gamma,
            dpo_label_smoothing, ld_alpha, pref_bco_weight, kto_chosen_weight, kto_rejected_weight,
            use_dft_loss, use_asft_loss, asft_alpha, use_eaft_loss, eaft_alpha, compute_accuracy
            (and, optionally, discopop_tau).
        precision: in which the model computes.
    Raises:
        ConfigError: an unknown stage or loss, or options that contradict each other.
    """
    if stage in ("pt", "sft"):
        chosen = [
            name
            for name in ("dft", "asft", "eaft")
            if stage == "sft" and getattr(args, f"use_{name}_loss")
        ]
        if len(chosen) > 1:
            raise ConfigError(
                f"use_{chosen[0]}_loss and use_{chosen[1]}_loss are both set. A run has one loss:"
                " keep one of them."
            )
        loss: Any = chosen[0] if chosen else "nll"
        alpha = {"asft": args.asft_alpha, "eaft": args.eaft_alpha}.get(loss, 0.0)
        return TokenStage(loss, alpha, accuracy=bool(args.compute_accuracy))
    if stage == "dpo":
        options = LossOptions(
            args.pref_beta,
            args.dpo_label_smoothing,
            args.simpo_gamma,
            getattr(args, "discopop_tau", 0.05),
        )
        return PreferenceStage(
            args.pref_loss, options, args.pref_ftx, args.pref_bco_weight, args.ld_alpha, precision
        )
    if stage == "kto":
        return KTOStage(
            args.pref_beta, args.kto_chosen_weight, args.kto_rejected_weight, args.pref_ftx
        )
    if stage == "rm":
        return RewardStage(precision=precision)
    raise ConfigError(f"stage: {stage} is not known. Choose one of pt, sft, rm, dpo, kto.")
