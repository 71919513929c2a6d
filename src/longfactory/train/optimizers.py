"""Optimizers that transformers' own choice does not cover: LoRA+, and AdamW on split master weights
or on the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from longfactory.config import RunConfig
from longfactory.errors import UserError
from longfactory.memory.optimizer import SplitAdamW
from longfactory.train.memory_plan import Memory
from longfactory.train.optimizer_names import EXACT

log = logging.getLogger("longfactory")


def optimizer_factory(
    cfg: RunConfig, memory: Memory
) -> Callable[[Any, Any], torch.optim.Optimizer] | None:
    """A function (model, trainer) -> optimizer, or None where the Trainer makes its own. Logs what
    is not the usual.

    Raises:
        UserError: another optimizer than AdamW together with states on the host or split weights.
    """
    placement = memory.plan.settings.optimizer
    ours = memory.split or (placement == "host" and not memory.deepspeed)
    name = str(cfg.trainer.optim)
    if ours and name not in EXACT:
        raise UserError(
            f"optim: {name} cannot keep its states on the host. Use adamw_torch, or"
            " optimizer_placement: gpu."
        )
    if memory.narrow is not None and not ours:
        source = memory.narrow.package or "pure_bf16"
        log.info(
            f"AdamW states in {memory.narrow.width} ({source}): not the exact fp32 trajectory."
        )
    overlap = placement == "host" and memory.plan.job.overlaps
    if overlap:
        log.info(
            "Nothing is clipped (max_grad_norm: 0): the host updates weights while backward"
            " goes on."
        )
    elif memory.plan.job.overlaps:
        log.warning(
            "optimizer_overlap does nothing here: AdamW's states fit on the GPU. For the host:"
            " optimizer_placement: host."
        )
    elsewhere = memory.plan.fixed.get("gradients") == "host" and placement == "gpu"
    if elsewhere:
        log.warning(
            "offload_gradients does nothing here: AdamW's states fit on the GPU. For the host:"
            " optimizer_placement: host."
        )
    settings = {
        "placement": placement,
        "gradients": "gpu" if overlap else memory.plan.settings.gradients,
        "overlap": overlap,
    }
    if cfg.method.loraplus_lr_ratio is not None:
        return _lora_plus(cfg.method, settings if ours else None)
    return _split_adamw(settings) if ours else None


def _lora_plus(
    method: Any, settings: dict[str, Any] | None
) -> Callable[[Any, Any], torch.optim.Optimizer]:
    """LoRA+ (Hayou et al., 2024): B matrices learn `loraplus_lr_ratio` times as fast. `settings`:
    SplitAdamW's; None: torch's AdamW.
    """

    def make(model: Any, trainer: Any) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        args = trainer.args
        if settings is None:
            cls, kwargs = trainer.get_optimizer_cls_and_kwargs(args, model)
        else:
            cls, kwargs = (
                SplitAdamW,
                {
                    "lr": args.learning_rate,
                    **_adamw_settings(args),
                    **settings,
                },
            )
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


def _split_adamw(settings: dict[str, Any]) -> Callable[[Any, Any], torch.optim.Optimizer]:
    def make(model: Any, trainer: Any) -> torch.optim.Optimizer:
        args = trainer.args
        decay = set(trainer.get_decay_parameter_names(model))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if n in decay], "weight_decay": args.weight_decay},
            {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
        ]
        return SplitAdamW(groups, lr=args.learning_rate, **_adamw_settings(args), **settings)

    return make


def one_dtype_each(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in which all parameters have one type, for DeepSpeed.

    It lays the parameters of a group end to end in one buffer: beside a float32 value head, bf16
    weights would come out of it as float32, and the next product of the two types fails.
    """
    divided = []
    for group in groups:
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        divided += [{**group, "params": parameters} for parameters in by_dtype.values()]
    return divided
