"""Optimizers that transformers' own choice does not cover: LoRA+, and AdamW on split master weights or on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from longfactory.config import RunConfig
from longfactory.errors import UserError
from longfactory.model.memory.optimizer import SplitAdamW
from longfactory.train.memory_plan import Memory


def optimizer_factory(cfg: RunConfig, memory: Memory) -> Callable[[Any, Any], torch.optim.Optimizer] | None:
    """A function (model, trainer) -> optimizer, or None where the Trainer makes its own.

    Raises:
        UserError: another optimizer than AdamW together with states on the host or split weights.
    """
    placement = memory.plan.settings.optimizer
    if memory.split or placement == "host":
        name = str(cfg.trainer("optim"))
        if not name.startswith("adamw_torch"):
            raise UserError(f"optim: {name} cannot keep its states on the host. Use adamw_torch, or optimizer_placement: gpu.")
        if cfg.method.loraplus_lr_ratio is not None:
            raise UserError("loraplus_lr_ratio needs two learning rates; AdamW on the host has one. Set optimizer_placement: gpu.")
        return _split_adamw(placement)
    ratio = cfg.method.loraplus_lr_ratio
    if ratio is None:
        return None

    def lora_plus(model: Any, trainer: Any) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        return create_loraplus_optimizer(
            model,
            optimizer_cls=cls,
            loraplus_lr_ratio=ratio,
            loraplus_lr_embedding=cfg.method.loraplus_lr_embedding,
            loraplus_weight_decay=trainer.args.weight_decay,
            **kwargs,
        )

    return lora_plus


def check_checkpoints(memory: Memory, sharding: str, *, saves_states: bool, resumes: bool) -> None:
    """Refuses checkpoints that could not be resumed from.

    The states of split masters and of AdamW on the host are plain tensors of this rank's shard. The sharded checkpoint format takes a plain
    tensor for one that all ranks share and keeps rank 0's: a resumed run would go on with wrong states.

    Raises:
        UserError: sharded parameters, such an optimizer, and optimizer states to be saved or read.
    """
    if sharding != "fsdp2" or not (memory.split or memory.plan.settings.optimizer == "host"):
        return
    if saves_states or resumes:
        raise UserError(
            "This run keeps AdamW's states on the host or beside split weights, and checkpoints of sharded runs cannot hold those yet. "
            "Set save_only_model: true (weights alone) or save_strategy: no, and do not resume; or make room with more GPUs or shorter "
            "rows and set optimizer_placement: gpu."
        )


def _split_adamw(placement: str) -> Callable[[Any, Any], torch.optim.Optimizer]:
    def make(model: Any, trainer: Any) -> torch.optim.Optimizer:
        args = trainer.args
        decay = set(trainer.get_decay_parameter_names(model))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if n in decay], "weight_decay": args.weight_decay},
            {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        return SplitAdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, placement=placement)  # type: ignore[arg-type]

    return make
