"""What processes tell each other outside the training step. Every function is collective, and does
nothing where there is one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether several processes are in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_main(x: Any) -> Any:
    """What the first process has. Collective."""
    if not is_distributed():
        return x
    box = [x]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def everywhere(mine: bool, device: torch.device) -> bool:
    """Whether every process says yes. Collective; the flag is reduced on `device`."""
    if not is_distributed():
        return mine
    flag = torch.tensor(float(mine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def from_all(x: Any) -> list[Any]:
    """What each process has, in the order of ranks."""
    if not is_distributed():
        return [x]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found
