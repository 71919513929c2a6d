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
    ours = memory.split or placement == "host"
    name = str(cfg.trainer("optim"))
    if ours and not name.startswith("adamw_torch"):
        raise UserError(f"optim: {name} cannot keep its states on the host. Use adamw_torch, or optimizer_placement: gpu.")
    if cfg.method.loraplus_lr_ratio is not None:
        return _lora_plus(cfg.method, placement if ours else None)
    return _split_adamw(placement) if ours else None


def _lora_plus(method: Any, placement: str | None) -> Callable[[Any, Any], torch.optim.Optimizer]:
    """LoRA+ (Hayou et al., 2024): B matrices learn `loraplus_lr_ratio` times as fast. `placement`: SplitAdamW's; None: torch's AdamW."""

    def make(model: Any, trainer: Any) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        args = trainer.args
        if placement is None:
            cls, kwargs = trainer.get_optimizer_cls_and_kwargs(args, model)
        else:
            cls, kwargs = SplitAdamW, {"lr": args.learning_rate, **_adamw_settings(args), "placement": placement}
        return create_loraplus_optimizer(
            model,
            optimizer_cls=cls,
            loraplus_lr_ratio=method.loraplus_lr_ratio,
            loraplus_lr_embedding=method.loraplus_lr_embedding,
            loraplus_weight_decay=args.weight_decay,
            **kwargs,
        )

    return make


def _adamw_settings(args: Any) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _split_adamw(placement: str) -> Callable[[Any, Any], torch.optim.Optimizer]:
    def make(model: Any, trainer: Any) -> torch.optim.Optimizer:
        args = trainer.args
        decay = set(trainer.get_decay_parameter_names(model))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if n in decay], "weight_decay": args.weight_decay},
            {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
        ]
        return SplitAdamW(groups, lr=args.learning_rate, **_adamw_settings(args), placement=placement)  # type: ignore[arg-type]

    return make
