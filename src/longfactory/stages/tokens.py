"""Pretraining and supervised fine-tuning: the loss of a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.config.loss_facts import TOKEN_FACTS
from longfactory.config.stage_facts import STAGES
from longfactory.data.row import IGNORE, Row
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.base import Stateless, alone, as_outputs, detached_sum
from longfactory.stages.metrics import Metrics
from longfactory.stages.user_loss import LossContract, UserLoss, load_user_loss


def nll(out: TokenOutputs, alpha: float) -> Tensor:
    """[T] -logp."""
    return -out.logps


def dft(out: TokenOutputs, alpha: float) -> Tensor:
    """[T] -p logp with p constant (arXiv 2508.05629)."""
    return -out.logps * out.logps.detach().exp()


def asft(out: TokenOutputs, alpha: float) -> Tensor:
    """[T] dft + alpha KL(reference || policy) over the vocabulary, as LLaMA-Factory defines it
    (arXiv 2509.23753).
    """
    assert out.reference_kl is not None
    return dft(out, alpha) + alpha * out.reference_kl


def eaft(out: TokenOutputs, alpha: float) -> Tensor:
    """[T] -(H/3)^alpha logp, H the entropy of the 20 most probable tokens (as in LLaMA-Factory)."""
    assert out.entropy is not None
    return -out.logps * (out.entropy.detach() / 3.0) ** alpha


def smoothed(out: TokenOutputs, alpha: float) -> Tensor:
    """[T] -(1 - alpha) logp - alpha mean logp over the vocabulary: label smoothing, as in
    transformers' LabelSmoother.
    """
    assert out.mean_logp is not None
    return -(1 - alpha) * out.logps - alpha * out.mean_logp


TokenLoss = Callable[[TokenOutputs, float], Tensor]

TOKEN_LOSSES: dict[str, TokenLoss] = {name: globals()[name] for name in TOKEN_FACTS}
"""Every loss of a token that `config/loss_facts.py` has a line for, by its name. They are given
what the output layer made of each token, [T], and the number of their key `alpha`.
"""


CONTRACT = LossContract(("outputs", "row"), {"needs": ()}, "token")

MADE = ("entropy", "mean_logit", "top1")
"""Fields of `TokenOutputs` that a function of the user's may need: those without a reference."""


@dataclasses.dataclass
class TokenStage(Stateless):
    """Pretraining and supervised fine-tuning. An item is a trained token.

    `loss` is one of `TOKEN_LOSSES`, `alpha` its number; or the loss is `user_loss`.
    """

    loss: str = "nll"
    alpha: float = 0.0
    accuracy: bool = False
    output: Literal["logps", "values"] = "logps"
    ld_alpha: float | None = None
    needs_reference: bool = False
    user_loss: UserLoss | None = None
    """In place of `loss`: a function that `loss_path` names."""

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """See `Stage`. Reads loss_path, the switches and numbers of `TOKEN_FACTS`, and
        compute_accuracy.
        """
        loss, alpha = "nll", 0.0
        for candidate, facts in TOKEN_FACTS.items():
            if facts.switch in STAGES[name].keys and getattr(args, facts.switch):
                loss = candidate
                alpha = getattr(args, facts.alpha) if facts.alpha else 0.0
        user_loss = load_user_loss(args.loss_path, CONTRACT) if args.loss_path else None
        if user_loss is not None:
            unknown = [n for n in user_loss.attributes["needs"] if n not in MADE]
            if unknown:
                raise UserError(
                    f"loss_path: {user_loss.path} needs {', '.join(unknown)}, which the output"
                    f" layer does not make for it. It makes {', '.join(MADE)}."
                )
        return cls(loss, alpha, bool(args.compute_accuracy), user_loss=user_loss)

    @property
    def needs(self) -> frozenset[str]:
        if self.user_loss is None:
            needs = frozenset(TOKEN_FACTS[self.loss].needs)
        else:
            needs = frozenset(self.user_loss.attributes["needs"])
        return needs | {"top1"} if self.accuracy else needs

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
            name = self.loss if self.user_loss is None else self.user_loss.path
            raise UserError(
                f"The {name} loss needs {', '.join(missing)} from the output layer, which did not"
                " make it."
            )
        trained = row.labels != IGNORE
        metrics: Metrics = {}
        if self.user_loss is None:
            each = TOKEN_LOSSES[self.loss](out, self.alpha)
        else:
            each = self.user_loss(out.logps, out, row)
        if "reference_kl" in self.needs and out.reference_kl is not None:
            metrics["kl"] = (
                detached_sum(torch.where(trained, out.reference_kl, 0.0)),
                float(row.trained_tokens),
            )
        if self.accuracy and out.top1 is not None:
            metrics["accuracy"] = (detached_sum(out.top1 & trained), float(row.trained_tokens))
        return (
            torch.where(trained, each, torch.zeros_like(each)).sum(dtype=torch.float64),
            metrics,
        )
