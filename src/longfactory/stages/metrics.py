"""Metrics as sums and counts, so that adding them over micro-batches and data-parallel groups gives
the true mean.

A mean of means is wrong as soon as two batches differ in size; and a ratio cannot be repaired once
it is a ratio. The names that a stage reports do not depend on the row (a missing thing has count
0): every rank adds the same names in the same order, so one reduction of one vector serves them
all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor | float]]
"""name -> (sum, count). What is logged is sum / count."""


class MetricSums:
    """Adds up metrics on the device; nothing waits for the device until `means`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            total = total.detach().to(torch.float64)
            # a number is written by a kernel: a copy from the host would wait for the device
            counted = (
                count.to(total) if isinstance(count, Tensor) else torch.full_like(total, count)
            )
            entry = torch.stack([total, counted])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def copy(self) -> MetricSums:
        """What has been added so far; the sums themselves are never changed in place."""
        copy = MetricSums()
        copy._sums = dict(self._sums)
        return copy

    def state_dict(self) -> dict[str, list[float]]:
        """name -> [sum, count] of what was added since the last `means`."""
        return {name: entry.tolist() for name, entry in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Goes on with the sums of `state_dict`."""
        self._sums = {
            name: torch.tensor(entry, dtype=torch.float64, device=device)
            for name, entry in state.items()
        }

    def means(self, dp_sum: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        """Reduces over the data-parallel groups (one collective, entered by all ranks alike),
        empties itself and returns the means.

        A metric whose count is 0 is left out. `rewards/margins` is made from the two reward means
        where a stage does not report it (KTO, whose chosen and rejected answers are not pairs).
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = dp_sum(torch.stack([self._sums[n] for n in names])).tolist()
        self._sums = {}
        out = {n: s / c for n, (s, c) in zip(names, sums, strict=True) if c}
        if "rewards/margins" not in names and "rewards/chosen" in out and "rewards/rejected" in out:
            out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        return out
