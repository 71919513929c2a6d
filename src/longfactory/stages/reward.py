"""The reward model: the loss of a pair of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.data.row import Row
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.base import Stateless, alone, as_outputs, detached_sum, wins
from longfactory.stages.metrics import Metrics
from longfactory.stages.pairs import find_pairs, of_role, pick


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

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """See `Stage`. No key beside the stage's name is read."""
        return cls(precision=precision)

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
            "rewards/chosen": (detached_sum(chosen), n),
            "rewards/rejected": (detached_sum(rejected), n),
            "rewards/margins": (detached_sum(chosen - rejected), n),
        }
