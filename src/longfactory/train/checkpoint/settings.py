"""The optimizer's settings on resuming: a checkpoint gives it its states back, and the run's own
keys give it learning rate, schedule, decay and betas.

torch and transformers restore all of them from the checkpoint, so that a learning rate that was
changed had no effect.
"""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

KEYS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
"""Of a parameter group: set by the run's keys, never changed by the optimizer."""


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each parameter group, as the run's keys made them. To be called before a
    checkpoint is loaded and after the schedule is made.
    """
    return [{k: group[k] for k in KEYS if k in group} for group in optimizer.param_groups]


def apply_settings(optimizer: Any, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Gives the groups the run's own settings back after a checkpoint was loaded, and the learning
    rate that its schedule has at the step that is reached. Where nothing was changed, nothing
    changes in any bit.
    """
    groups = optimizer.param_groups
    for group, own in zip(groups, settings, strict=True):
        for key, value in own.items():
            old = group.get(key)
            if key == "initial_lr" and not isinstance(scheduler, LambdaLR):
                continue
            if old is None or _plain(old) != _plain(value):
                group[key] = value
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, factor in zip(groups, factors, strict=True):
        group["lr"] = group["initial_lr"] * factor
    scheduler._last_lr = [group["lr"] for group in groups]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
