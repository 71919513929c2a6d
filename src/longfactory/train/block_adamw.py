"""BAdam (Luo et al., 2024), by layers: AdamW on one decoder layer at a time, whose states are
dropped when the next one's turn comes.

Written here and not taken from the package badam: that keeps its place in the order of the layers
nowhere (a resumed run would begin with the first layer), and knows no FSDP2.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

STATES = ("exp_avg", "exp_avg_sq")


class BlockAdamW(torch.optim.Optimizer):
    """AdamW on one block of parameters for `interval` updates, then on the next.

    States are float32, and parameters in half precision have a float32 copy while it is their turn.
    Gradients of other blocks are dropped (`drop_inactive`), before they are clipped.

    Args:
        groups: parameter groups with `params`, `block` (their number) and `weight_decay`.
        order: of the blocks. random: each once, then all again in another order.
        start: the first block (ascending, descending), or the only one (fixed).
        seed: of random orders.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        interval: int = 50,
        order: Literal["ascending", "descending", "random", "fixed"] = "ascending",
        start: int | None = None,
        seed: int = 0,
    ) -> None:
        # "updates" stands in the groups because a checkpoint holds those.
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "updates": 0})
        self.interval, self.order, self.start, self.seed = interval, order, start, seed
        self.blocks = 1 + max(g["block"] for g in self.param_groups)

    @property
    def active(self) -> int:
        """The block that the next update changes."""
        return block_of(
            self.param_groups[0]["updates"] // self.interval,
            self.blocks,
            self.order,
            self.start,
            self.seed,
        )

    def drop_inactive(self) -> None:
        """Leaves the gradients of the active block alone."""
        active = self.active
        for group in self.param_groups:
            if group["block"] != active:
                for p in group["params"]:
                    p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of the active block. Without gradients (a step that is skipped) nothing
        changes and nothing is counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.drop_inactive()
        active, updated = self.active, False
        for group in self.param_groups:
            if group["block"] != active:
                for p in group["params"]:
                    self.state.pop(p, None)
                continue
            updated = self._update(group) or updated
        if updated:
            for group in self.param_groups:
                group["updates"] += 1
        return loss

    def _update(self, group: dict[str, Any]) -> bool:
        parameters = [p for p in group["params"] if p.grad is not None]
        masters, states = [], []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                if p.dtype != torch.float32:
                    state["master"] = p.detach().to(torch.float32)
                for name in STATES:
                    state[name] = torch.zeros_like(p, dtype=torch.float32)
            masters.append(state.get("master", p))
            states.append(state)
        if not parameters:
            return False
        gradients = [p.grad.to(torch.float32) for p in parameters]
        adamw_update(masters, gradients, states, group)
        for p, master in zip(parameters, masters, strict=True):
            if master is not p:
                p.copy_(master)
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but float32 states stay float32 beside parameters in half precision."""
        super().load_state_dict(state_dict)
        keep_saved_types(self, state_dict)


def block_of(turn: int, blocks: int, order: str, start: int | None = None, seed: int = 0) -> int:
    """Which of `blocks` is trained in turn number `turn`, counted from 0."""
    if order == "fixed":
        return start or 0
    if order == "ascending":
        return ((start or 0) + turn) % blocks
    if order == "descending":
        return ((blocks - 1 if start is None else start) - turn) % blocks
    numbers = list(range(blocks))
    random.Random(f"{seed}-{turn // blocks}").shuffle(numbers)
    return numbers[turn % blocks]


def adamw_update(
    masters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """One AdamW update of float32 tensors, in place, by the group's numbers. `states` hold `step`
    and `STATES`.
    """
    adamw(
        masters,
        gradients,
        *([state[name] for state in states] for name in STATES),
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        foreach=False,
    )


def keep_saved_types(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """After torch's load_state_dict, which gives states their parameter's type: those of the
    state_dict once more, as they were saved.
    """
    numbers = [n for g in state_dict["param_groups"] for n in g["params"]]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and name != "step":
                optimizer.state[p][name] = value.detach().clone().to(p.device)
