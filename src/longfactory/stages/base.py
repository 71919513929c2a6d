"""The stages: what is summed over a row, and what is counted. Single-device code that never hears
of sequence parallelism.

A stage receives the row's token log-probabilities (or values) in natural order, whole, on every
rank of a sequence-parallel group, and returns the *sum* of its items' losses. The trainer
differentiates `DP * loss_sum / N`, N the items of the whole optimizer step; so every loss is the
exact mean over the step, however items are dealt to micro-batches and groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.data.row import Row
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.metrics import Metrics
from longfactory.stages.pairs import document_sums, pick


def alone(x: Tensor) -> Tensor:
    """The sum over data-parallel groups when there is one."""
    return x


class Stage(Protocol):
    """What is learnt from a row. One class in one file, which a line of `config/stage_facts.py`
    names.
    """

    output: Literal["logps", "values"]
    """What the head must give: log-probabilities of the labels, or the value head's numbers."""
    ld_alpha: float | None
    """How `document_logps` weighs tokens; what is computed before training must be computed with
    the same.
    """

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """The stage of a run.

        Args:
            name: the value of the key `stage`.
            args: the run's `FinetuningArguments`.
            precision: in which the model computes.
        Raises:
            ConfigError: keys that contradict each other.
        """
        ...

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


def detached_sum(x: Tensor) -> Tensor:
    """The sum of all entries, float64, without gradient: for a metric."""
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
