"""Optimizers that transformers' own choice does not cover: LoRA+, and AdamW on split master weights
or on the host.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from longfactory.config import RunConfig
from longfactory.config.optimizer_facts import OptimizerFacts, chosen, in_backward
from longfactory.errors import UserError
from longfactory.memory.optimizer import SplitAdamW
from longfactory.sp.text_model import decoder_layers
from longfactory.train import package_optimizers
from longfactory.train.block_adamw import BlockAdamW
from longfactory.train.memory_plan import Memory
from longfactory.train.muon import MuonAdamW, muon_groups
from longfactory.train.optimizer_names import EXACT
from longfactory.train.ratio_adamw import RatioAdamW

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
            f"AdamW states in {memory.narrow.width} ({source}): training does not follow the "
            "exact fp32 trajectory."
        )
    overlap = placement == "host" and memory.plan.job.overlaps
    if overlap:
        log.info(
            "No gradient clipping (max_grad_norm: 0): the host updates weights during the "
            "backward pass."
        )
    elif memory.plan.job.overlaps:
        log.warning(
            "optimizer_overlap has no effect: AdamW's states fit on the GPU. To keep them on "
            "the host, set optimizer_placement: host."
        )
    elsewhere = memory.plan.fixed.get("gradients") == "host" and placement == "gpu"
    if elsewhere:
        log.warning(
            "offload_gradients has no effect: AdamW's states fit on the GPU. To keep them on "
            "the host, set optimizer_placement: host."
        )
    settings = {
        "placement": placement,
        "gradients": "gpu" if overlap else memory.plan.settings.gradients,
        "overlap": overlap,
    }
    facts = chosen(cfg)
    if facts is not None:
        return _method_optimizer(cfg, facts)
    if cfg.method.loraplus_lr_ratio is not None:
        return _lora_plus(cfg.method, settings if ours else None)
    return _split_adamw(settings) if ours else None


def _method_optimizer(
    cfg: RunConfig, facts: OptimizerFacts
) -> Callable[[Any, Any], torch.optim.Optimizer]:
    """The optimizer that a switch of the run names."""
    if (layerwise := in_backward(cfg)) is not None:
        log.info(
            f"{layerwise}: weights are updated during the backward pass, without gradient "
            "clipping; grad_norm is logged as 0."
        )
    make = {"use_muon": _muon, "use_badam": _badam, "use_adam_mini": _adam_mini}
    return functools.partial(make.get(facts.name, _low_rank), cfg, facts.name)


def _muon(cfg: RunConfig, name: str, model: Any, trainer: Any) -> torch.optim.Optimizer:
    args = trainer.args
    decay = set(trainer.get_decay_parameter_names(model))
    groups = muon_groups(model, decay, args.weight_decay)
    stacked = sum(p.ndim > 2 for p in model.parameters() if p.requires_grad)
    count = sum(len(g["params"]) for g in groups if g.get("muon"))
    rest = sum(len(g["params"]) for g in groups) - count
    log.info(f"Muon trains {count} matrices, AdamW the other {rest} parameters.")
    if stacked:
        log.warning(
            f"{stacked} parameters hold several matrices each (routed experts): AdamW trains them."
        )
    return MuonAdamW(groups, lr=args.learning_rate, **_adamw_settings(args))


def _adam_mini(cfg: RunConfig, name: str, model: Any, trainer: Any) -> torch.optim.Optimizer:
    return package_optimizers.adam_mini(model, trainer.args)


def _low_rank(cfg: RunConfig, name: str, model: Any, trainer: Any) -> torch.optim.Optimizer:
    args = trainer.args
    cls, settings, targets, layerwise = package_optimizers.low_rank(
        cfg.method, str(cfg.trainer.optim), name
    )
    decay = set(trainer.get_decay_parameter_names(model))
    groups = package_optimizers.low_rank_groups(model, targets, decay, args.weight_decay, settings)
    projected = sum(len(g["params"]) for g in groups if "rank" in g)
    if not projected:
        raise UserError(
            f"{name.replace('use_', '')}_target: {', '.join(targets)} names no linear layer that is"
            " trained. Give parts of their names, or all."
        )
    log.info(f"{name}: {projected} matrices of rank {settings['rank']}.")
    if layerwise:
        groups = package_optimizers.one_parameter_each(groups)
    others = _adamw_settings(args)
    if str(cfg.trainer.optim) == "adafactor":
        others = {"scale_parameter": False, "relative_step": False}
    optimizer = cls(groups, lr=args.learning_rate, **others)
    optimizer = package_optimizers.keep_projections(optimizer)
    return package_optimizers.update_in_backward(optimizer) if layerwise else optimizer


def _badam(cfg: RunConfig, name: str, model: Any, trainer: Any) -> torch.optim.Optimizer:
    args, method = trainer.args, cfg.method
    decay = set(trainer.get_decay_parameter_names(model))
    prefix, layers = decoder_layers(model)
    if method.badam_start_block is not None and method.badam_start_block >= len(layers):
        raise UserError(
            f"badam_start_block: {method.badam_start_block} was given, and the model has layers 0"
            f" to {len(layers) - 1}."
        )
    groups: list[dict[str, Any]] = []
    blocks = 0
    for i in range(len(layers)):
        named = [
            (n, p)
            for n, p in model.named_parameters()
            if n.startswith(f"{prefix}.{i}.") and p.requires_grad
        ]
        for decays in (True, False):
            parameters = [p for n, p in named if (n in decay) is decays]
            if parameters:
                weight_decay = args.weight_decay if decays else 0.0
                groups.append({"params": parameters, "block": blocks, "weight_decay": weight_decay})
        blocks += bool(named)
    inside = {id(p) for g in groups for p in g["params"]}
    for p in model.parameters():
        if id(p) not in inside:
            p.requires_grad_(False)
    interval = method.badam_switch_interval
    interval = sys.maxsize if interval < 1 else interval
    if method.badam_mode == "ratio":
        log.info(
            f"BAdam trains {100 * method.badam_update_ratio:g} % of the entries of each matrix "
            f"in the decoder's layers at a time, for {method.badam_switch_interval} updates, "
            "then the next ones. Embeddings, output layer and last norm are frozen."
        )
        for group in groups:
            del group["block"]
        return RatioAdamW(
            groups,
            lr=args.learning_rate,
            **_adamw_settings(args),
            share=method.badam_update_ratio,
            interval=interval,
        )
    log.info(
        f"BAdam trains one of {blocks} decoder layers at a time, each for "
        f"{method.badam_switch_interval} updates ({method.badam_switch_mode}). Embeddings, "
        "output layer and last norm are frozen."
    )
    return BlockAdamW(
        groups,
        lr=args.learning_rate,
        **_adamw_settings(args),
        interval=interval,
        order=method.badam_switch_mode,
        start=method.badam_start_block,
        seed=args.seed,
    )


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
