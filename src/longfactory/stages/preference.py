"""Direct preference optimisation and its kin: the loss of a pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.config.loss_facts import PREFERENCE_FACTS, USER_FACTS, PreferenceFacts
from longfactory.config.stage_facts import REFERENCE_KEYS, preference_problems
from longfactory.data.row import Row
from longfactory.errors import ConfigError, UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages import losses
from longfactory.stages.base import alone, as_outputs, detached_sum, mean_logits, wins
from longfactory.stages.losses import DataParallel, LossOptions
from longfactory.stages.metrics import Metrics
from longfactory.stages.pairs import (
    PairLogps,
    document_logps,
    find_pairs,
    of_role,
    pick,
    reference_logps,
)
from longfactory.stages.user_loss import LossContract, UserLoss, load_user_loss

CONTRACT = LossContract(
    ("pairs", "options", "data_parallel"), {"reference": True, "per_token": False}, "pair"
)


def user_preference_loss(args: FinetuningArguments) -> UserLoss | None:
    """The loss that `loss_path` names: a `losses.PreferenceLoss`. None where the key is not given.

    Raises:
        UserError: the file or the function cannot be used, or has no reference and one is named.
    """
    if args.loss_path is None:
        return None
    loss = load_user_loss(args.loss_path, CONTRACT)
    if not loss.attributes["reference"]:
        for key in sorted(REFERENCE_KEYS):
            if getattr(args, key):
                raise UserError(
                    f"{key} was given, and loss_path: {loss.path} says that it has no reference"
                    " (reference = False). Leave one of them out."
                )
    return loss


@dataclasses.dataclass
class PreferenceStage:
    """Direct preference optimisation and its kin. An item is a pair.

    The loss of a pair is `pref_loss` (or `user_loss`); with `bco_weight` w it is (loss + w bco) /
    (1 + w); then `ftx` times minus the chosen answer's mean log-probability is added. The reward
    shift of bco is the running mean of the rewards of all pairs seen in training, over all
    data-parallel groups; it is state, and belongs into a checkpoint (`state_dict`).
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
    user_loss: UserLoss | None = None
    """In place of `pref_loss`: a function that `loss_path` names."""
    # [2]: sum of rewards, number of rewards
    _rewards: Tensor | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.pref_loss not in losses.PREFERENCE_LOSSES:
            raise ConfigError(
                f"pref_loss: {self.pref_loss} is not known. Choose one of"
                f" {', '.join(losses.PREFERENCE_LOSSES)}."
            )
        for problem in preference_problems(
            self.loss_name,
            self.facts,
            beta=self.options.beta,
            label_smoothing=self.options.label_smoothing,
            bco_weight=self.bco_weight,
            ld_alpha=self.ld_alpha,
        ):
            raise ConfigError(problem)

    @property
    def loss_name(self) -> str:
        """The key and what it names."""
        if self.user_loss is None:
            return f"pref_loss: {self.pref_loss}"
        return f"loss_path: {self.user_loss.path}"

    @property
    def facts(self) -> PreferenceFacts:
        """What is true of the loss."""
        if self.user_loss is None:
            return PREFERENCE_FACTS[self.pref_loss]
        return dataclasses.replace(USER_FACTS, **self.user_loss.attributes)

    def pair_losses(self, p: PairLogps, dp: DataParallel) -> Tensor:
        """[P] float64 the loss of each pair, without bco and ftx."""
        if self.user_loss is None:
            return losses.PREFERENCE_LOSSES[self.pref_loss](p, self.options, dp)
        return self.user_loss(p.chosen, p, self.options, dp)

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """See `Stage`. Reads loss_path, pref_loss, what `LossOptions.of` reads, pref_ftx,
        pref_bco_weight and ld_alpha.
        """
        return cls(
            args.pref_loss,
            LossOptions.of(args),
            args.pref_ftx,
            args.pref_bco_weight,
            args.ld_alpha,
            precision,
            user_loss=user_preference_loss(args),
        )

    @property
    def needs_reference(self) -> bool:
        return self.facts.reference

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
        loss = self.pair_losses(p, dp)
        if self.bco_weight:
            loss = (
                loss + self.bco_weight * losses.bco(p, self.options, self._reward_shift(p, dp))
            ) / (1 + self.bco_weight)
        nll = -p.chosen / p.chosen_length.clamp(min=1)
        if self.ftx:
            loss = loss + self.ftx * nll

        seen = p.per_token() if self.facts.per_token else p
        n, beta = float(p.chosen.shape[0]), self.options.beta
        chosen, rejected = beta * seen.chosen_ratio.detach(), beta * seen.rejected_ratio.detach()
        metrics: Metrics = {
            "rewards/chosen": (chosen.sum(), n),
            "rewards/rejected": (rejected.sum(), n),
            "rewards/accuracies": (wins(chosen, rejected, beta * self.noise(p)), n),
            "rewards/margins": ((chosen - rejected).sum(), n),
            "logps/chosen": (detached_sum(seen.chosen), n),
            "logps/rejected": (detached_sum(seen.rejected), n),
            **mean_logits(out, row, {role: of_role(row, role) for role in ("chosen", "rejected")}),
        }
        if self.pref_loss == "orpo":
            metrics["odds_ratio_loss"] = (detached_sum(losses.odds_ratio(p)), n)
        if self.pref_loss == "orpo" or self.ftx:
            metrics["sft_loss"] = (detached_sum(nll), n)
        return loss.sum(), metrics

    def noise(self, p: PairLogps) -> Tensor:
        """[P] margins that rounding alone can make: an error of the precision's epsilon in the
        log-probability of each trained token, which is of the order of 1, adds up over n tokens to
        sqrt(n) of it."""
        tokens = p.chosen_length.clamp(min=1), p.rejected_length.clamp(min=1)
        if self.facts.per_token:
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
