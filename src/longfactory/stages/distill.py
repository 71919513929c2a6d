"""Distillation: the divergence from a teacher's most probable entries, stored for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.data.row import IGNORE, Row
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.base import Stateless, alone, as_outputs, detached_sum
from longfactory.stages.metrics import Metrics

LEAST = 1e-6
"""Probability below which what is left beside the stored entries counts as this."""

Divergence = Literal["forward", "reverse", "js"]


def with_rest(logps: Tensor) -> Tensor:
    """[T, K] log-probabilities of some entries -> [T, K + 1], the last that of all the others."""
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=LEAST)
    return torch.cat([logps, rest.log()], -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """[T, K], [T, K] log-probabilities -> [T] KL(p || q)."""
    return (p.exp() * (p - q)).sum(-1)


def divergence(teacher: Tensor, student: Tensor, kind: Divergence, js_beta: float) -> Tensor:
    """[T] divergences of distributions given as log-probabilities [T, K].

    forward: KL(teacher || student); reverse: KL(student || teacher); js: with
    m = b teacher + (1 - b) student, b KL(teacher || m) + (1 - b) KL(student || m).
    """
    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    b = torch.tensor(js_beta, dtype=student.dtype, device=student.device)
    mixed = torch.logsumexp(torch.stack([teacher + b.log(), student + (1 - b).log()]), 0)
    return b * kl(teacher, mixed) + (1 - b) * kl(student, mixed)


@dataclasses.dataclass
class DistillStage(Stateless):
    """`stage: distill`. An item is a trained token: alpha times the divergence from the teacher,
    and 1 - alpha times -log p of the label.
    """

    kind: Divergence = "forward"
    js_beta: float = 0.5
    alpha: float = 1.0
    output: Literal["logps", "values"] = "logps"
    ld_alpha: float | None = None
    needs_reference: bool = False
    needs: frozenset[str] = frozenset({"candidates"})

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """See `Stage`. Reads the keys distill_*."""
        return cls(args.distill_loss, args.distill_js_beta, args.distill_alpha)

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
        out, trained = as_outputs(x), row.labels != IGNORE
        zeros = torch.zeros_like(out.logps)
        count = float(row.trained_tokens)
        nll = torch.where(trained, -out.logps, zeros)
        teacher = row.numbers.get("teacher_logp")
        if teacher is None or out.candidates is None:
            if row.trained_tokens:
                raise UserError(
                    "stage: distill got a row without the teacher's numbers. They are made before"
                    " training; begin the run again."
                )
            return nll.sum(dtype=torch.float64), {}
        # untrained places have no distribution: any will do
        held = torch.where(trained[:, None], teacher.to(out.logps.dtype), -10.0)
        own = torch.where(trained[:, None], out.candidates, -10.0)
        each = divergence(with_rest(held), with_rest(own), self.kind, self.js_beta)
        each = torch.where(trained, each, zeros)
        metrics: Metrics = {
            "divergence": (detached_sum(each), count),
            "nll": (detached_sum(nll), count),
            "teacher_mass": (detached_sum(torch.where(trained, held.exp().sum(-1), zeros)), count),
        }
        return (self.alpha * each + (1 - self.alpha) * nll).sum(dtype=torch.float64), metrics
