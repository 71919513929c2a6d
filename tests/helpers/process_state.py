"""What a test may change in its process and has to put back: tests after it would see it, in one
order and not in another.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
OF_LIBRARIES = {
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # accelerate sets it for good, at the first trainer
    # torch, when it first compiles or starts CUDA
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "TRITON_CACHE_DIR",
    "CUDA_MODULE_LOADING",
}
"""Environment variables that tests cannot help."""
OWN = "longfactory"
"""The beginning of the names of the loggers that are watched: (level, disabled, propagate, handlers)."""

Setting = tuple[Any, Callable[[], Any]]
"""A value, and what sets it again."""


def settings() -> dict[str, Setting]:
    """All that is watched, by a name for people."""
    return _signals() | _environment() | _logs() | _torch()


def put_back(before: dict[str, Setting]) -> list[str]:
    """Sets again what has changed since, and says it."""
    now = settings()
    told = []
    for name in before.keys() | now.keys():
        was, again = before.get(name, (None, None))
        found, _ = now.get(name, (None, None))
        if was == found:
            continue
        if again is not None:
            again()
        elif name.startswith("os.environ"):
            os.environ.pop(name.split("'")[1], None)
        else:
            continue  # a logger or a package that was not there before
        told.append(f"{name}: {was!r} -> {found!r}")
    return sorted(told)


def _signals() -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        found[f"handler of {number.name}"] = (handler, _again(signal.signal, number, handler))
    return found


def _environment() -> dict[str, Setting]:
    found: dict[str, Setting] = {"os.getcwd()": (os.getcwd(), _again(os.chdir, os.getcwd()))}
    for name, value in os.environ.items():
        if name not in OF_LIBRARIES:
            found[f"os.environ['{name}']"] = (value, _again(os.environ.__setitem__, name, value))
    return found


def _logs() -> dict[str, Setting]:
    manager = logging.root.manager
    found: dict[str, Setting] = {
        "logging.disable": (manager.disable, _again(logging.disable, manager.disable))
    }
    for name, log in list(manager.loggerDict.items()):
        if name.startswith(OWN) and isinstance(log, logging.Logger):
            value = (log.level, log.disabled, log.propagate, list(log.handlers))
            found[f"log {name}"] = (value, _again(_set_log, log, *value))
    return found


def _set_log(
    log: logging.Logger, level: int, disabled: bool, propagate: bool, handlers: list[Any]
) -> None:
    log.setLevel(level)
    log.disabled, log.propagate, log.handlers = disabled, propagate, handlers


def _torch() -> dict[str, Setting]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_default_device"):
        return {}
    found: dict[str, Setting] = {}
    for name, get, put in (
        ("threads", torch.get_num_threads, torch.set_num_threads),
        ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        ("default device", torch.get_default_device, torch.set_default_device),
        ("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
        (
            "deterministic algorithms",
            torch.are_deterministic_algorithms_enabled,
            torch.use_deterministic_algorithms,
        ),
        (
            "precision of products in float32",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
    ):
        found[f"torch's {name}"] = (get(), _again(put, get()))
    return found


def _again(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)
