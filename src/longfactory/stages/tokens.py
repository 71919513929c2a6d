"""Pretraining and supervised fine-tuning: the loss of a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from longfactory.data.row import IGNORE, Row
from longfactory.errors import ConfigError, UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.base import Stateless, alone, as_outputs, detached_sum
from longfactory.stages.metrics import Metrics


@dataclasses.dataclass
class TokenStage(Stateless):
    """Pretraining and supervised fine-tuning. An item is a trained token.

    `loss` is one of nll: -logp; dft: -p logp with p constant (arXiv 2508.05629); asft: dft + alpha
    KL(reference || policy) over the vocabulary, as LLaMA-Factory defines it (arXiv 2509.23753);
    eaft: -(H/3)^alpha logp, H the entropy of the 20 most probable tokens (as in LLaMA-Factory).
    """

    names: ClassVar[tuple[str, ...]] = ("pt", "sft")

    loss: Literal["nll", "dft", "asft", "eaft"] = "nll"
    alpha: float = 0.0
    accuracy: bool = False
    output: Literal["logps", "values"] = "logps"
    ld_alpha: float | None = None
    needs_reference: bool = False

    @classmethod
    def from_arguments(cls, name: str, args: Any, precision: torch.dtype) -> Self:
        """See `Stage`. Reads use_dft_loss, use_asft_loss, asft_alpha, use_eaft_loss, eaft_alpha and
        compute_accuracy.
        """
        chosen = [
            loss
            for loss in ("dft", "asft", "eaft")
            if name == "sft" and getattr(args, f"use_{loss}_loss")
        ]
        if len(chosen) > 1:
            raise ConfigError(
                f"use_{chosen[0]}_loss and use_{chosen[1]}_loss are both set. A run has one loss:"
                " keep one of them."
            )
        loss: Any = chosen[0] if chosen else "nll"
        alpha = {"asft": args.asft_alpha, "eaft": args.eaft_alpha}.get(loss, 0.0)
        return cls(loss, alpha, accuracy=bool(args.compute_accuracy))

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
                detached_sum(torch.where(trained, out.reference_kl, 0.0)),
                float(row.trained_tokens),
            )
        if self.loss == "eaft" and out.entropy is not None:
            losses_ = losses_ * (out.entropy.detach() / 3.0) ** self.alpha
        if self.accuracy and out.top1 is not None:
            metrics["accuracy"] = (detached_sum(out.top1 & trained), float(row.trained_tokens))
        return (
            torch.where(trained, losses_, torch.zeros_like(losses_)).sum(dtype=torch.float64),
            metrics,
        )
