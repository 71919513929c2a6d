"""What a run has for a reference: a second model, the trained model with its adapter off, or cached
numbers; and how a model is made to compute as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from longfactory.config.adapter_facts import adapter_is_start
from longfactory.data.row import Row
from longfactory.errors import UserError
from longfactory.model.token_logprobs import TokenLogprobs


class Numbers(Protocol):
    """Reference log-probabilities of a data set's documents (`cache.ReferenceCache`)."""

    def attach(self, row: Row) -> Row:
        """The row (on the host) with `reference_logp` on every document that has a reference."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference of a run; one that has none is `Reference()`."""

    by_adapter: bool = False
    """It is the trained model with its adapter off, computed in every step."""
    model: tuple[nn.Module, TokenLogprobs] | None = None
    """A second model and its output layer, held during training by a loss that compares whole
    distributions.
    """
    computed: tuple[tuple[Any, Numbers], ...] = ()
    """Data sets, each with the numbers that were computed for it before training."""

    def numbers_of(self, dataset: Any) -> Numbers | None:
        """What was computed for this very data set, or None."""
        return next((numbers for known, numbers in self.computed if known is dataset), None)


def adapter_is_reference(method: Any) -> bool:
    """Whether the reference is the trained model with its adapter off.

    Not with PiSSA or OLoRA, which move a part of the weights into the adapter: without it the model
    is not the one that training starts from.
    """
    return adapter_is_start(method) and method.ref_model is None


def check_reference(policy: Any, reference: Any, *, same_architecture: bool = True) -> None:
    """Compares the transformers configurations of the policy and of a reference model.

    Args:
        same_architecture: False for a teacher, whose family and vocabulary may be others
            (`teacher.make_teacher` looks at the vocabulary).

    Raises:
        UserError: another architecture or another vocabulary: its log-probabilities would be about
            other tokens.
    """
    if not same_architecture:
        return
    a, b = policy.get_text_config(), reference.get_text_config()
    if a.model_type != b.model_type or a.vocab_size != b.vocab_size:
        raise UserError(
            f"The reference model is {b.model_type} with {b.vocab_size} tokens, the trained model"
            f" {a.model_type} with {a.vocab_size}. A reference must be of the same family and"
            " vocabulary: usually the model from which training starts."
        )


def disable_dropout(model: nn.Module) -> int:
    """Sets every dropout of the model to 0 and returns how many were not. A log-ratio between two
    random masks is noise.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            changed += 1
    return changed


@contextlib.contextmanager
def as_reference(model: nn.Module, adapter_off: bool) -> Iterator[None]:
    """While open, `model` computes reference log-probabilities: no gradient, evaluation mode and,
    with `adapter_off`, the base weights.

    Args:
        model: possibly wrapped by DDP or DeepSpeed.
    Raises:
        UserError: there is no adapter to switch off, or its initialisation changed the base
            weights.
    """
    with contextlib.ExitStack() as stack:
        if adapter_off:
            stack.enter_context(_adapter_off(model))
        training = {m for m in model.modules() if m.training}
        stack.enter_context(torch.no_grad())
        model.eval()
        try:
            yield
        finally:
            for m in training:
                m.training = True


@contextlib.contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    """While open, `model` computes as it was before its adapter.

    What is trained goes on saying so, which PEFT takes away: FSDP2 looks for it in a model's first
    pass, which this may be, and would reduce all later gradients in the type that they are computed
    in.
    """
    inner: Any = model
    while not hasattr(inner, "peft_config"):
        for name in ("module", "_orig_mod"):
            if isinstance(getattr(inner, name, None), nn.Module):
                inner = getattr(inner, name)
                break
        else:
            raise UserError(
                "The reference is the model without its adapter, but the model has none. Name a"
                " `ref_model`."
            )
    for name, config in inner.peft_config.items():
        start = str(getattr(config, "init_lora_weights", ""))
        if start.startswith(("pissa", "olora", "corda", "loftq")):
            raise UserError(
                f"Adapter {name} starts from `{start}`, which changes the base weights: without the"
                " adapter the model is not the one that training started from. Set"
                " `precompute_ref_log_probs: true` or name a `ref_model`."
            )
    trained = [p for p in inner.parameters() if p.requires_grad]
    with inner.disable_adapter():
        for p in trained:
            p.requires_grad_(True)
        yield
