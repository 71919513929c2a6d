"""After resuming, learning rate, schedule and decay are the run's own; unchanged ones in every bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_cosine_schedule_with_warmup

from longfactory.train.checkpoint.settings import apply_settings, settings_of


def make(rate: float, decay: float = 0.1, steps: int = 10) -> tuple[Any, Any]:
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    groups = [
        {"params": weights[:1], "weight_decay": decay},
        {"params": weights[1:], "weight_decay": 0.0, "lr": 2 * rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, 2, steps)


def step(optimizer: Any, schedule: Any, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        rates.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("changes", [{}, {"rate": 0.005}, {"decay": 0.5}, {"steps": 20}])
def test_a_resumed_run_has_its_own_settings(changes: dict[str, Any]) -> None:
    before = make(rate=0.01)
    step(*before, 5)
    states = copy.deepcopy([x.state_dict() for x in before])
    resumed, whole = make(**{"rate": 0.01, **changes}), make(**{"rate": 0.01, **changes})
    step(*whole, 5)
    own = settings_of(resumed[0])
    for x, state in zip(resumed, states, strict=True):
        x.load_state_dict(state)
    apply_settings(*resumed, own)
    decays = [[g["weight_decay"] for g in o.param_groups] for o, _ in (resumed, whole)]
    assert decays[0] == decays[1]
    assert step(*resumed, 5) == step(*whole, 5)  # every bit of the rates that are trained with
    if changes:
        assert own != settings_of(make(rate=0.01)[0]) or "steps" in changes


def test_a_schedule_that_goes_by_what_it_has_seen_keeps_its_rate() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.01)
    schedule = ReduceLROnPlateau(optimizer, patience=0)
    own = settings_of(optimizer)
    for loss in (1.0, 2.0):
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    apply_settings(optimizer, schedule, own)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
