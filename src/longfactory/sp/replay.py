"""Attention results kept across activation checkpointing, so that the recompute runs no kernel and
sends no message.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_state = threading.local()


@contextmanager
def keep(store: MutableSequence[Any]) -> Iterator[None]:
    """Records the (out, lse) of each attention call inside, or, where `store` already holds a pass,
    replays and empties it.

    Enter it twice with the same store: around the forward pass, and around its recompute. With
    torch.utils.checkpoint (use_reentrant=False): `context_fn=lambda: (keep(store), keep(store))`
    with a fresh `store = []` a call. Only `append`, `pop(0)` and `len` of the store are used, so a
    store may move its entries to the host and back.

    Costs T/n * H * (Dv * element size + 4) bytes a call.

    Raises:
        RuntimeError: the recompute makes another number of attention calls than the forward pass,
            or with other shapes.
    """
    outer = getattr(_state, "current", None)
    replay = len(store) > 0
    _state.current = (store, replay)
    try:
        yield
    finally:
        _state.current = outer


def kept() -> tuple[Tensor, Tensor] | None:
    """The next recorded (out, lse) where a recompute is under way."""
    current = getattr(_state, "current", None)
    if current is None or not current[1]:
        return None
    if len(current[0]) == 0:
        raise RuntimeError(
            "sp.keep: the recompute makes more attention calls than the forward pass did."
        )
    return current[0].pop(0)


def record(out: Tensor, lse: Tensor) -> None:
    """Keeps what an attention call returned, where a first pass is under way."""
    current = getattr(_state, "current", None)
    if current is not None and not current[1]:
        current[0].append((out.detach(), lse.detach()))


def active() -> bool:
    """Whether a first pass or a recompute is under way."""
    return getattr(_state, "current", None) is not None
