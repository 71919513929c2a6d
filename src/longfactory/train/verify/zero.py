"""What `longfactory verify` needs of DeepSpeed: a configuration without what is not compared, whole
parameters, and the gradients that its engine has before its step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longfactory.shard import settings as shard

NOT_COMPARED = ("optimizer", "scheduler", "fp16", "gradient_clipping")
"""Sections of DeepSpeed's file: the optimizer's own work, and what follows from the run's keys."""


def without_optimizer(path_or_dict: str | dict[str, Any], *, bf16: bool) -> dict[str, Any]:
    """The user's DeepSpeed configuration without its optimizer, and without its states' offload."""
    config = shard.deepspeed_config(path_or_dict, bf16=bf16)
    for section in NOT_COMPARED:
        config.pop(section, None)
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        zero.pop("offload_optimizer", None)
    return {**config, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True}


@contextlib.contextmanager
def whole(p: Tensor, *, writes: bool = False) -> Iterator[Tensor]:
    """A parameter that ZeRO-3 may have partitioned, whole inside the block. Collective if it is.
    `writes`: it is changed in the block, alike on every rank.
    """
    if not hasattr(p, "ds_id"):
        yield p
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p], modifier_rank=0 if writes else None):
        yield p


def count(p: Tensor) -> int:
    """Numbers of a parameter, whole."""
    return int(getattr(p, "ds_numel", p.numel()))


def before_step(engine: Any, take: Callable[[], None]) -> Callable[[], None]:
    """Calls `take` before every step of DeepSpeed's engine, which uses the gradients up. Returns
    what ends it.
    """
    step = engine.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            take()
        return step(*args, **kwargs)

    engine.step = watched
    return lambda: engine.__dict__.pop("step")


@torch.no_grad()
def gradients(model: nn.Module, main: bool) -> dict[str, Tensor]:
    """The whole, reduced gradients by name on the host, if `main`. Collective."""
    from deepspeed.utils import safe_get_full_grad

    out = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        g = safe_get_full_grad(p)
        if main and g is not None:
            out[name] = g.detach().to("cpu", torch.float32, copy=True)
    return out
