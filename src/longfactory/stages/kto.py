"""KTO: the loss of a labelled answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.data.row import Row
from longfactory.model.outputs import TokenOutputs
from longfactory.stages import losses
from longfactory.stages.base import Stateless, alone, as_outputs, mean_logits
from longfactory.stages.metrics import Metrics
from longfactory.stages.pairs import document_logps, of_role, pick, reference_logps


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

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """See `Stage`. Reads pref_beta, kto_chosen_weight, kto_rejected_weight and pref_ftx."""
        return cls(args.pref_beta, args.kto_chosen_weight, args.kto_rejected_weight, args.pref_ftx)

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
