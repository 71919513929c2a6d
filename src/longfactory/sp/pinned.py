"""Copies from the host to the device that nothing waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def copied(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. It comes from pinned memory, which PyTorch keeps until it
    is read: from other memory, a copy of more than 64 KB keeps the host until the GPU has done what
    was queued before.
    """
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
