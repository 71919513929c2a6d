"""BAdam by shares (`badam_mode: ratio`): AdamW on some adjacent entries of every matrix, whose
states are dropped when the next ones' turn comes.

Written here and not taken from the package badam: that draws where it begins, and no checkpoint
holds it. Here turn t trains entries t n to (t + 1) n of a matrix, modulo its size, n the share of
it: the number of updates says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from longfactory.train.block_adamw import STATES, adamw_update, keep_saved_types

SMALL = 100
"""Entries up to which a parameter is trained whole, as in the package."""


class RatioAdamW(torch.optim.Optimizer):
    """AdamW on a share of the entries of each parameter for `interval` updates, then on the next.

    States are float32, and parameters in half precision have a float32 copy of the entries whose
    turn it is. Gradients of the others become 0 (`drop_inactive`), before they are clipped.

    Args:
        groups: parameter groups with `params` and `weight_decay`.
        share: of a parameter's entries, in (0, 1].
        interval: updates of a turn.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        share: float,
        interval: int,
    ) -> None:
        # "updates" stands in the groups because a checkpoint holds those.
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "updates": 0})
        self.share, self.interval = share, interval

    @property
    def turn(self) -> int:
        """The turn of the next update, counted from 0."""
        return int(self.param_groups[0]["updates"]) // self.interval

    @torch.no_grad()
    def drop_inactive(self) -> None:
        """Leaves the gradients of the entries alone whose turn it is."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    inactive = torch.ones_like(p.grad, dtype=torch.bool)
                    for part in parts_of(p.numel(), self.turn, self.share):
                        inactive.view(-1)[part] = False
                    p.grad.masked_fill_(inactive, 0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. Without gradients (a step that is skipped) nothing changes and nothing is
        counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turn, updated = self.turn, False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, turn)
                    updated = True
        if updated:
            for group in self.param_groups:
                group["updates"] += 1
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], turn: int) -> None:
        assert p.grad is not None
        flat, parts = p.view(-1), parts_of(p.numel(), turn, self.share)
        gradient = torch.cat([p.grad.view(-1)[part] for part in parts]).float()
        state = self.state[p]
        if state.get("turn") != turn:
            state.clear()
            state["turn"], state["step"] = turn, torch.zeros((), dtype=torch.float32)
            state["master"] = torch.cat([flat[part] for part in parts]).float()
            for name in STATES:
                state[name] = torch.zeros_like(gradient)
        adamw_update([state["master"]], [gradient], [state], group)
        start = 0
        for part in parts:
            length = part.stop - part.start
            flat[part] = state["master"][start : start + length].to(p.dtype)
            start += length

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but float32 states stay float32 beside parameters in half precision."""
        super().load_state_dict(state_dict)
        keep_saved_types(self, state_dict)


def parts_of(size: int, turn: int, share: float) -> list[slice]:
    """The entries of a flat parameter whose turn it is: one stretch, or two where the turn goes
    over the end.

    Args:
        size: entries.
        turn: counted from 0.
        share: of the entries.
    """
    count = max(1, int(size * share))
    if size <= SMALL or count >= size:
        return [slice(0, size)]
    start = turn * count % size
    over = start + count - size
    return [slice(start, start + count)] if over <= 0 else [slice(0, over), slice(start, size)]
