"""GaLore, APOLLO and Adam-mini: the packages' optimizers, with what a run needs beside them (states
that a checkpoint can hold, updates in the backward pass).
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from longfactory.config.optimizer_facts import METHOD_OPTIMIZERS
from longfactory.errors import UserError
from longfactory.sp.hf import layer_configs

PROJECTOR = "projector"
"""The name of the object that holds a low-rank projection in the packages' states."""


def low_rank_groups(
    model: nn.Module,
    targets: tuple[str, ...],
    decay: set[str],
    weight_decay: float,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Groups of GaLore and APOLLO: trained weights of linear layers are projected, the rest is not.

    Args:
        targets: parts of modules' names; ("all",): every linear layer but the output layer.
        decay: names of the other parameters with weight decay.
        settings: of the projected ones (rank and so on).
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    chosen = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and module is not head
        and (targets == ("all",) or any(target in name for target in targets))
    }
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rest = [(n, p) for n, p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for n, p in rest if n not in decay], "weight_decay": 0.0},
        {"params": [p for n, p in rest if n in decay], "weight_decay": weight_decay},
        {
            "params": [p for _, p in trained if id(p) in chosen],
            "weight_decay": weight_decay,
            **settings,
        },
    ]
    return [g for g in groups if g["params"]]


def one_parameter_each(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups with one parameter each."""
    return [{**group, "params": [p]} for group in groups for p in group["params"]]


def keep_projections(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A checkpoint holds numbers and tensors, and the packages keep an object in their states: it
    is written as what it holds, and made again when the states are loaded. Returns the optimizer.
    """

    def saved(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {
            number: {k: _as_mapping(v) if k == PROJECTOR else v for k, v in state.items()}
            for number, state in state_dict["state"].items()
        }
        return {**state_dict, "state": states}

    held: dict[int, dict[str, Any]] = {}

    def loading(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        # torch casts what it finds in states to the parameter's type, and knows no texts there
        held.clear()
        states = {}
        for number, state in state_dict["state"].items():
            if PROJECTOR in state:
                held[number] = state[PROJECTOR]
            states[number] = {k: v for k, v in state.items() if k != PROJECTOR}
        return {**state_dict, "state": states}

    def loaded(made: Any) -> None:
        parameters = [p for group in made.param_groups for p in group["params"]]
        for number, projector in held.items():
            made.state[parameters[number]][PROJECTOR] = _from_mapping(projector)
        held.clear()

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loading)
    optimizer.register_load_state_dict_post_hook(loaded)
    return optimizer


KINDS = {
    "GaLoreProjector": ("galore_torch.galore_projector", "apollo_torch.svd_projector"),
    "GradientProjector": ("apollo_torch.random_projector",),
}
"""Classes that are made again, and where they may be found."""


def _as_mapping(projector: Any) -> dict[str, Any]:
    if isinstance(projector, dict):
        return projector
    return {**vars(projector), "kind": type(projector).__name__, "of": type(projector).__module__}


def _from_mapping(held: dict[str, Any]) -> Any:
    values = dict(held)
    kind, module = values.pop("kind"), values.pop("of")
    if module not in KINDS.get(kind, ()):
        raise ValueError(f"a projection of the unknown kind {module}.{kind}")
    cls = getattr(importlib.import_module(module), kind)
    projector = cls.__new__(cls)
    vars(projector).update(values)
    return projector


def update_in_backward(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Each parameter is updated, and its gradient freed, as soon as backward gives it; `step` does
    nothing any more. For one process. Returns the optimizer, whose groups have one parameter each.
    """
    step = type(optimizer).step

    def update(number: int, parameter: torch.Tensor) -> None:
        every = optimizer.param_groups
        optimizer.param_groups = [every[number]]
        try:
            step(optimizer)
        finally:
            optimizer.param_groups = every
        parameter.grad = None

    for number, group in enumerate(optimizer.param_groups):
        (parameter,) = group["params"]
        parameter.register_post_accumulate_grad_hook(functools.partial(update, number))
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)  # type: ignore[method-assign]
    return optimizer


def low_rank(
    method: Any, optim: str, name: str
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], tuple[str, ...], bool]:
    """The package's class, the settings of projected parameters, their modules, and whether they
    are updated in the backward pass.

    Args:
        method: the finetuning arguments.
        optim: the run's `optim`.
        name: use_galore or use_apollo.
    """
    facts = METHOD_OPTIMIZERS[name]
    try:
        package = importlib.import_module(str(facts.module))
    except ImportError as error:  # galore-torch and apollo-torch import bitsandbytes
        raise UserError(
            f"{name}: {facts.package} cannot be imported ({error}). Run: pip install"
            f" {facts.package} bitsandbytes"
        ) from error
    if name == "use_galore":
        adafactor = optim == "adafactor"
        cls = package.GaLoreAdafactor if adafactor else package.GaLoreAdamW
        if not adafactor:
            cls = functools.partial(cls, no_deprecation_warning=True)
        settings = {
            "rank": method.galore_rank,
            "update_proj_gap": method.galore_update_interval,
            "scale": method.galore_scale,
            "proj_type": method.galore_proj_type,
        }
        return cls, settings, method.galore_target, method.galore_layerwise
    settings = {
        "rank": method.apollo_rank,
        "proj": method.apollo_proj,
        "proj_type": method.apollo_proj_type,
        "update_proj_gap": method.apollo_update_interval,
        "scale": method.apollo_scale,
        "scale_type": method.apollo_scale_type,
    }
    cls = functools.partial(package.APOLLOAdamW, scale_front=method.apollo_scale_front)
    return cls, settings, method.apollo_target, method.apollo_layerwise


def adam_mini(model: Any, args: Any) -> torch.optim.Optimizer:
    """Adam-mini (Zhang et al., 2024) with the model's own heads."""
    from adam_mini import Adam_mini

    text = model.config.get_text_config()
    if len(shapes := {_heads(layer) for layer in layer_configs(text)}) > 1:
        raise UserError(
            "use_adam_mini: layers of this model differ in their heads (query heads, key heads,"
            f" width: {', '.join(map(str, sorted(shapes)))}), and Adam-mini takes one number for"
            " all. Use use_muon, or optim: adamw_torch_8bit."
        )
    heads, kv_heads, width = shapes.pop()
    optimizer = Adam_mini(
        named_parameters=model.named_parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        dim=text.hidden_size,
        n_heads=heads,
        n_kv_heads=kv_heads,
        verbose=False,
    )
    # The package takes a head for hidden_size / heads wide, which is not so in every model.
    optimizer.head_numel = width * text.hidden_size
    for group in optimizer.param_groups:
        (p,) = group["params"]
        of_heads = any(name in group["name"] for name in optimizer.wqk_names)
        if of_heads and p.ndim > 1 and p.numel() % optimizer.head_numel:
            raise UserError(
                f"use_adam_mini: {group['name']} {tuple(p.shape)} is not made of heads of"
                f" {width} x {text.hidden_size} numbers, which Adam-mini needs. Use use_muon, or"
                " optim: adamw_torch_8bit."
            )
    # It would talk to as many processes as there are GPUs; DDP has summed the gradients already.
    optimizer.world_size = 1
    return optimizer


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head in the layers of one configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width
