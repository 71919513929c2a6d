"""Rotary embeddings whose frequencies depend on the length of the row: longrope (Phi-3, Phi-4,
PhiMoE) and dynamic NTK.

transformers decides them from the largest position that it is given. A rank holds a part of the
row, so the ranks would choose different frequencies. The row's largest position is known on the
host: it is given as one more position, whose angles are dropped.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import probe
from .hooks import ModelHooks
from .layout import ancestors_length
from .pinned import copied
from .plan import RowPlan

_positions: weakref.WeakKeyDictionary[RowPlan, dict[torch.device, Tensor]] = (
    weakref.WeakKeyDictionary()
)

_longer: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Embeddings that are being given one position more, until they return."""


def longest_document(plan: RowPlan) -> int:
    """The row's largest position, plus one."""
    return max(
        before + s.stop - s.start
        for s, before in zip(plan.segments, ancestors_length(plan.segments), strict=True)
    )


def positions(plan: RowPlan, device: torch.device) -> Tensor:
    """[T/n] positions of this rank's tokens in their documents. Copied to the device once for all
    layers.
    """
    held = _positions.setdefault(plan, {})
    if device not in held:
        starts = torch.tensor([s.start for s in plan.segments])
        first = torch.tensor(ancestors_length(plan.segments)) - starts
        # An empty segment begins where the next one does: the last that begins at or before the
        # token holds it.
        segment = torch.searchsorted(starts, plan.index, right=True) - 1
        held[device] = copied(plan.index + first[segment], device)
    return held[device]


def prepare(model: nn.Module, hooks: ModelHooks) -> None:
    """Hooks every rotary embedding that depends on the length. Others are left alone."""
    for module in model.modules():
        if _kinds(module):
            hooks.before(module, _add_last_position)
            hooks.after(module, _drop_last_position)


def depends_on_length(model: nn.Module) -> bool:
    """Whether the model has rotary embeddings whose frequencies depend on the row's length."""
    return any(_kinds(module) for module in model.modules())


def _kinds(module: nn.Module) -> list[str]:
    given = getattr(module, "rope_type", None)
    kinds = list(given.values()) if isinstance(given, dict) else [given]
    return [k for k in kinds if isinstance(k, str) and ("dynamic" in k or k == "longrope")]


def _add_last_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    plan: RowPlan | None = getattr(positions, "sp_plan", None)
    _longer.discard(module)
    if plan is None:
        return None
    _longer.add(module)
    longest = longest_document(plan)
    if (seen := probe.current()) is not None:
        seen.rows.add(longest)
    _forget(module, positions.device)
    # [1, T/n] -> [1, T/n + 1]
    longer = torch.cat(
        [positions, positions.new_full((*positions.shape[:-1], 1), longest - 1)], dim=-1
    )
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": longer}
    return (args[0], longer, *args[2:]), kwargs


def _drop_last_position(module: nn.Module, args: Any, output: Any) -> Any:
    if module not in _longer:
        return None
    _longer.discard(module)
    return tuple(x[:, :-1] for x in output) if isinstance(output, tuple) else output[:, :-1]


def _forget(module: nn.Module, device: torch.device) -> None:
    """Dynamic frequencies grow with the longest row seen so far, and DDP would copy those of rank 0
    to every rank. Each row starts from the original ones, so that its loss does not depend on the
    rows before it, and a resumed run equals one that never stopped."""
    given = module.rope_type
    for kind, prefix in (
        [(given, "")]
        if isinstance(given, str)
        else [(k, f"{layer}_") for layer, k in given.items()]
    ):
        if isinstance(kind, str) and "dynamic" in kind:
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(device, copy=True))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
