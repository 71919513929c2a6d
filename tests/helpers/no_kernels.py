"""Triton without a GPU and without Triton: its kernels can be imported, and launches compute
nothing. For what is allocated around them, and which settings they are given.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import longfactory.sp.recurrent as package

MODULES = ("chunk_kernels", "chunk_math", "forward_kernels", "backward_kernels", "channel_kernels")
MODULES += ("unit_kernels",)


class OutOfResources(Exception):
    pass


@contextlib.contextmanager
def recurrent_kernels(
    launched: Callable[[str, tuple[int, ...], dict[str, Any]], None],
) -> Iterator[Any]:
    """`chunk_kernels`, made anew; as it was before afterwards.

    Args:
        launched: called with the kernel's name, the grid and what is given by name.
    """

    class Kernel:
        def __init__(self, fn: Any) -> None:
            self.name = fn.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **given: launched(self.name, grid, given)

    def jit(fn: Any = None, **_: Any) -> Any:
        return Kernel if fn is None else Kernel(fn)

    triton = types.ModuleType("triton")
    errors = types.ModuleType("triton.runtime.errors")
    errors.OutOfResources = OutOfResources  # type: ignore[attr-defined]
    triton.__dict__.update(
        jit=jit,
        language=mock.MagicMock(),
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    fakes = {
        "triton": triton,
        "triton.language": triton.language,
        "triton.runtime": types.ModuleType("triton.runtime"),
        "triton.runtime.errors": errors,
    }
    held = {name: vars(package).pop(name) for name in MODULES if name in vars(package)}
    try:
        with mock.patch.dict(sys.modules, fakes):
            for name in MODULES:
                sys.modules.pop(f"{package.__name__}.{name}", None)
            kernels = importlib.import_module(f"{package.__name__}.chunk_kernels")
            importlib.import_module(f"{package.__name__}.unit_kernels")
        yield kernels  # torch imports Triton, too, where there seems to be one
    finally:
        for name in MODULES:
            vars(package).pop(name, None)
        vars(package).update(held)
