"""Trainable parameters that a row of text gives no gradient: refused where that would spoil the
gradients of others, else reported.

DDP sums gradients over processes in buckets. A bucket that waits for a parameter without a gradient
is never summed, and its other parameters go on with the gradient of one process; nothing says so
until the second backward.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from longfactory import sp
from longfactory.errors import UserError
from longfactory.sp import hf, probe
from longfactory.train.ranks import from_all

if TYPE_CHECKING:
    from longfactory.train.trainer import RowTrainer

log = logging.getLogger("longfactory")

_FINISHED = "_check_reducer_finalized"
"""DDP's private method that raises where a gradient was missing: must be there at the start."""

TOKENS = 64
"""Of the row that is tried, at least."""


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that hold no gradient."""
    return [
        name.removeprefix("module.")
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is None
    ]


def refuse_unused(trainer: RowTrainer) -> None:
    """Under DDP, before the first step: one row forward and backward on each process, without
    summing. Collective.

    Raises:
        UserError: on every rank, where a trainable parameter has no gradient on one of them. Names
            the parameters.
    """
    model = trainer.model_wrapped
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    if not hasattr(model, _FINISHED):
        raise UserError(
            f"torch {torch.__version__} has no DistributedDataParallel.{_FINISHED}, by which a"
            " missing gradient is found. Use torch 2.11 to 2.13, sharding: fsdp2, or set"
            " ddp_find_unused_parameters: true."
        )
    alignment = sp.alignment(trainer.ctx)
    length = -(-TOKENS // alignment) * alignment
    plan = sp.plan(length, (sp.Segment(0, length),), trainer.ctx)
    device = trainer.args.device
    positions = torch.arange(length, device=device)
    ids = positions % 97 + 3
    images = {} if trainer.images is None else {"sp_media": trainer.images.none(plan, device)}
    training, devices = model.training, [positions.device] if positions.is_cuda else []
    model.train()
    try:
        with (
            probe.proof(),  # nothing is compiled for a row of this length
            torch.random.fork_rng(devices=devices),
            model.no_sync(),
            trainer.compute_loss_context_manager(),
        ):
            with trainer.head.labels(ids.cpu()[plan.index]):
                row = hf.inputs({"input_ids": ids, "position_ids": positions}, plan)
                out = model(**row, **images)
                loss = trainer.head.outputs(out.logits).logps.sum()
            loss.backward()
        mine = without_gradient(model)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    if unused := sorted({name for names in from_all(mine) for name in names}):
        raise UserError(
            f"{len(unused)} trainable parameters get no gradient from text: {_some(unused)}. "
            "With DDP, gradients of other parameters would then not be reduced. Do not train "
            "them (finetuning_type: freeze or lora), use one process or sharding: fsdp2, or "
            "set ddp_find_unused_parameters: true."
        )


def refuse_missing(model: nn.Module) -> None:
    """Under DDP, after the backward pass that sums gradients, on a process that had none for what
    others have one for: an expert that no token of its row chose. The others wait for it, and the
    next message of this process would be taken for that gradient. Not collective.

    DDP is asked, as a parameter may hold the gradient of an earlier micro-batch.

    Args:
        model: as it is wrapped.
    Raises:
        UserError: names the parameters, and the key to set.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    try:
        getattr(model, _FINISHED)()
    except RuntimeError as error:
        said = explain_unreduced(error, model)
        if said is None:
            raise
        raise UserError(said) from error


def explain_unreduced(error: RuntimeError, model: nn.Module) -> str | None:
    """DDP's own error where a parameter had no gradient, in words; None for another error."""
    text = str(error)
    if "Expected to have finished reduction" not in text:
        return None
    found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    places = [int(word) for word in found[1].split()] if found else []
    return _missing([trained[place].removeprefix("module.") for place in places])


def _missing(names: list[str]) -> str:
    return (
        f"Trainable parameters got no gradient from the rows of this process: {_some(names)}. With"
        " DDP each process must have a gradient of every trained parameter. Set"
        " ddp_find_unused_parameters: true, or do not train them (finetuning_type: freeze or lora)."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class ReportUnused(TrainerCallback):
    """At the first update without DDP, where nothing is spoilt: says which trainable parameters
    have no gradient.
    """

    def __init__(self, trainer: RowTrainer) -> None:
        self.trainer, self.done = trainer, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        # DeepSpeed and an optimizer on the host take gradients away as they come.
        if self.done or trainer.is_deepspeed_enabled or trainer._split_adamw() is not None:
            return
        self.done = True
        if unused := without_gradient(trainer.model_wrapped):
            log.warning(
                f"{len(unused)} trainable parameters got no gradient in the first step and are not"
                f" trained: {_some(unused)}."
            )
