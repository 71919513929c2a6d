"""A stand-in for torch.cuda's streams and page-locking, so that the code for GPUs runs on a CPU, in
order and without overlap.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch


class Stream:
    def __init__(self, device=None):
        self.waits = 0

    def wait_stream(self, other):
        self.waits += 1

    def wait_event(self, event):
        assert event.recorded
        self.waits += 1

    def synchronize(self):
        pass


class Event:
    def __init__(self):
        self.recorded = False

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        assert self.recorded


def install(monkeypatch: pytest.MonkeyPatch, refuse: bool = False) -> dict[int, int]:
    """Returns what is registered as pinned: address -> bytes."""
    locked: dict[int, int] = {}
    current = Stream()

    def register(address, size, flags):
        if refuse:
            return 2
        locked[address] = size
        return 0

    cudart = types.SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda address: int(locked.pop(address, None) is None),
    )
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: current,
        "stream": lambda s: contextlib.nullcontext(),
        "device": lambda d: contextlib.nullcontext(),
        "cudart": lambda: cudart,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return locked
