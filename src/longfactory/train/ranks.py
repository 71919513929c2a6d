"""What processes tell each other outside the training step. Every function is collective, and does
nothing where there is one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longfactory.errors import UserError

Result = TypeVar("Result")


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


def or_all_fail(function: Callable[[], Result]) -> Result:
    """Calls a function that does not communicate on every process, and where it failed on one, ends
    the run on all: the others would wait for the failed one in the next collective. Collective.

    Raises:
        Exception: what it raised, on the processes where it failed.
        UserError: on the others, where the first failed one raised one, with its sentence.
        RuntimeError: on the others, where that was another error, with what it says. As a
            UserError it would end the run before the failed process has written its traceback, and
            the launcher would not start the run again.
    """
    try:
        result = function()
    except Exception as error:
        from_all((_in_words(error), isinstance(error, UserError)))
        raise
    failed = [(rank, told) for rank, told in enumerate(from_all(None)) if told is not None]
    if failed:
        rank, (words, is_users) = failed[0]
        raise (UserError if is_users else RuntimeError)(f"Process {rank}: {words}")
    return result


def _in_words(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
