"""What the launcher of processes says to each of them."""

from __future__ import annotations

import pytest

VARIABLES = (
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "NNODES",
    "NPROC_PER_NODE",
    "FORCE_TORCHRUN",
    "LONGFACTORY_DEBUG",
)


def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a terminal of a person, until the test ends."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
