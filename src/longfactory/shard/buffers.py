"""Buffers where the first process alone reads a checkpoint for FSDP2: rotary frequencies, which are
in no file, and those that files hold (the correction of a router's scores, say).

accelerate sends each entry of the model's state dict as a parameter that is sharded, and ends at a
buffer; those outside of the state dict it keeps as each process has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def send_buffers(model: nn.Module, device: torch.device) -> None:
    """Gives every process the first one's buffers. Collective.

    Args:
        device: of the process group's messages.
    """
    for buffer in model.buffers():
        sent = buffer.to(device)
        dist.broadcast(sent, src=0)
        if sent is not buffer:
            buffer.copy_(sent)


def keep_buffers_apart(accelerator: Any) -> None:
    """Has accelerate prepare models without the buffers in their state dict, from now on."""
    own = accelerator.prepare

    def prepare(*given: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for model in given:
                if isinstance(model, nn.Module):
                    stack.enter_context(_apart(model))
            return own(*given, **kwargs)

    accelerator.prepare = prepare


@contextlib.contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    apart = [
        (module, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    for module, name in apart:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in apart:
            module._non_persistent_buffers_set.discard(name)
