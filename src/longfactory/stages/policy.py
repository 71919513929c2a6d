"""Policy gradients on what was rolled out before: every rollout is a document whose tokens carry an
advantage and, where they are known, the log-probabilities of the policy that drew them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from longfactory.config.arguments import FinetuningArguments
from longfactory.data.row import IGNORE, Row
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.base import Stateless, alone, as_outputs, detached_sum
from longfactory.stages.metrics import Metrics
from longfactory.stages.pairs import document_sums


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """Numbers of the loss. With r = p / p_behaviour and A the advantage, of a token:

    clip: -min(min(r, dual_clip) A, clamp(r, 1 - clip_low, 1 + clip_high) A)
    reinforce: -min(r, is_cap) A log p, the factor without gradient
    nll: -A log p

    and kl_beta (exp(d) - d - 1), d = log p_reference - log p, is added.
    """

    loss: Literal["clip", "reinforce", "nll"] = "clip"
    normalization: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    is_cap: float | None = None
    kl_beta: float = 0.0
    constant_length: int = 1


def log_ratios(logps: Tensor, old: Tensor, row: Row, options: PolicyOptions) -> Tensor:
    """[T] log r of each token; with `ratio: sequence` the mean of its rollout's (GSPO)."""
    each = logps - old
    if options.ratio == "token":
        return each
    counts = torch.tensor(
        [max(d.trained, 1) for d in row.documents], dtype=torch.float64, device=logps.device
    )
    return (document_sums(each, row) / counts).to(logps.dtype)[row.document_ids]


def token_losses(
    logps: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    row: Row,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """([T] losses of tokens, [T] whether the clip acts). All arguments [T].

    Args:
        old: log-probabilities under the policy that drew the tokens; None: those of this one now.
        reference: log-probabilities under the reference, for `kl_beta`.
    """
    behaviour = logps.detach() if old is None else old.to(logps.dtype)
    clipped = torch.zeros_like(logps, dtype=torch.bool)
    if options.loss == "nll":
        losses = -advantages * logps
    elif options.loss == "reinforce":
        weight = log_ratios(logps.detach(), behaviour, row, options).exp()
        if options.is_cap is not None:
            clipped = weight > options.is_cap
            weight = weight.clamp(max=options.is_cap)
        losses = -weight * advantages * logps
    else:
        r = log_ratios(logps, behaviour, row, options).exp()
        inside = r.clamp(1 - options.clip_low, 1 + options.clip_high)
        whole = r if options.dual_clip is None else r.clamp(max=options.dual_clip)
        losses = -torch.minimum(whole * advantages, inside * advantages)
        clipped = inside * advantages < whole * advantages
    if options.kl_beta and reference is not None:
        d = reference.to(logps.dtype) - logps
        losses = losses + options.kl_beta * (d.exp() - d - 1)
    return losses, clipped


@dataclasses.dataclass
class PolicyStage(Stateless):
    """`stage: rl`. An item is a trained token, or (normalization: sequence, constant) a rollout
    with a trained token.
    """

    options: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)
    output: Literal["logps", "values"] = "logps"
    ld_alpha: float | None = None
    needs_reference: bool = False
    needs: frozenset[str] = frozenset()

    @classmethod
    def from_arguments(cls, name: str, args: FinetuningArguments, precision: torch.dtype) -> Self:
        """See `Stage`. Reads the keys rl_*."""
        high = args.rl_clip_low if args.rl_clip_high is None else args.rl_clip_high
        return cls(
            PolicyOptions(
                loss=args.rl_loss,
                normalization=args.rl_normalization,
                ratio=args.rl_ratio,
                clip_low=args.rl_clip_low,
                clip_high=high,
                dual_clip=args.rl_dual_clip,
                is_cap=args.rl_is_cap,
                kl_beta=args.rl_kl_beta,
                constant_length=args.rl_constant_length or 1,
            )
        )

    def count_items(self, row: Row) -> int:
        if self.options.normalization == "token":
            return row.trained_tokens
        return sum(d.trained > 0 for d in row.documents)

    def loss_sum(
        self,
        x: Tensor | TokenOutputs,
        row: Row,
        *,
        dp_sum: Callable[[Tensor], Tensor] = alone,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> tuple[Tensor, Metrics]:
        logps, options = as_outputs(x).logps, self.options
        zeros = torch.zeros_like(logps)
        advantages = row.numbers.get("advantage", zeros).to(logps.dtype)
        old, reference = row.numbers.get("old_logp"), row.numbers.get("ref_logp")
        each, clipped = token_losses(logps, advantages, old, reference, row, options)
        trained = row.labels != IGNORE
        if options.normalization == "sequence":
            lengths = torch.tensor(
                [max(d.trained, 1) for d in row.documents], dtype=each.dtype, device=each.device
            )
            weighted = each / lengths[row.document_ids]
        else:
            length = options.constant_length if options.normalization == "constant" else 1
            weighted = each / length
        total = torch.where(trained, weighted, zeros).sum(dtype=torch.float64)
        return total, self._metrics(logps, advantages, old, reference, clipped, row)

    def _metrics(
        self,
        logps: Tensor,
        advantages: Tensor,
        old: Tensor | None,
        reference: Tensor | None,
        clipped: Tensor,
        row: Row,
    ) -> Metrics:
        """Means over trained tokens. staleness: log p_behaviour - log p, whose mean estimates
        KL(behaviour || policy): how far the policy has gone since the rollouts were drawn.
        """
        trained, count = row.labels != IGNORE, float(row.trained_tokens)

        def mean_of(values: Tensor) -> tuple[Tensor, float]:
            kept = torch.where(trained, values.detach(), torch.zeros_like(values))
            return detached_sum(kept), count

        metrics: Metrics = {"advantage": mean_of(advantages)}
        if old is not None:
            metrics["staleness"] = mean_of(old.to(logps.dtype) - logps)
            metrics["ratio"] = mean_of((logps - old.to(logps.dtype)).exp())
        if self.options.loss == "clip" or self.options.is_cap is not None:
            metrics["clipped"] = mean_of(clipped.to(logps.dtype))
        if reference is not None:
            d = reference.to(logps.dtype) - logps
            metrics["kl"] = mean_of(d.exp() - d - 1)
        return metrics
