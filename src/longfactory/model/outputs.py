"""What the output layer gives to a loss: one number (or flag) a token."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TokenOutputs:
    """Vectors over tokens (first dimension T), in the row's natural order once gathered. Entries
    without a label are 0 (False).
    """

    logps: Tensor
    """[T] log-probability of the label, fp32 (fp64 for fp64)."""
    top1: Tensor | None = None
    """[T] bool: the label was the most probable token."""
    entropy: Tensor | None = None
    """[T] entropy in nats of the 20 most probable tokens, renormalised; carries no gradient. Made
    only for a stage that asks.
    """
    mean_logit: Tensor | None = None
    """[T] mean of the token's logits over the vocabulary; carries no gradient. Made only for a
    stage that asks.
    """
    mean_logp: Tensor | None = None
    """[T] mean log-probability over the vocabulary. Made only for a stage that asks."""
    candidates: Tensor | None = None
    """[T, K] log-probabilities of the vocabulary entries that the row names (`Row.candidates`).
    Made only for a stage that asks.
    """
    reference_kl: Tensor | None = None
    """[T] KL(reference || policy) over the vocabulary, differentiable in the policy. Made only for
    a stage that asks.
    """
    reference: Tensor | None = None
    """[T] the reference model's log-probability of the label; carries no gradient."""
