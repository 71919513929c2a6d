"""The names of attention kernels: what a run's file may say, and what the engine has. Imports no
torch, so that every part can ask.

This is the only list. `sp.backends.BACKENDS` has exactly these names beside "auto", in this order.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, get_args

Kernel = Literal[
    "auto", "fa4", "flash3", "cudnn", "flash2", "flash", "triton", "efficient", "cpu", "math"
]
KERNELS: tuple[str, ...] = get_args(Kernel)[1:]
"""In order of preference."""

OTHER_NAMES: dict[str, str] = {
    "fa3": "flash3",
    "flash_attention_3": "flash3",
    "fa2": "flash2",
    "flash_attention_2": "flash2",
    "flash4": "fa4",
    "flash_attention_4": "fa4",
    "sdpa": "auto",
    "disabled": "math",
    "eager": "math",
}
"""Names of LLaMA-Factory (`flash_attn:`) and of transformers (`attn_implementation`) -> the name
here. PyTorch's `sdpa` chooses among kernels, as `auto` does; `disabled` and `eager` are the plain
formulas."""

_PACKAGES: dict[str, tuple[str, str, str]] = {
    "fa4": ("flash_attn", "cute", 'Run: pip install "longfactory[fa4]"'),
    "flash3": (
        "flash_attn_interface",
        "",
        "Build FlashAttention 3 (the hopper folder of its repository)",
    ),
    "flash2": ("flash_attn", "flash_attn_interface.py", "Run: pip install flash-attn"),
}
"""The package of a kernel that does not come with PyTorch, what must lie in it (several packages
share a name), and how to get it.
"""


def canonical(name: str) -> str:
    """The kernel's one name; an unknown name comes back as it is."""
    return OTHER_NAMES.get(name, name)


def not_installed(name: str) -> str | None:
    """What to do to have the kernel `name`, where its package is not there; None where it is, or
    where there is no package to it.

    Finds the package without importing it.
    """
    if name not in _PACKAGES:
        return None
    package, part, remedy = _PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return remedy
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if part and not any((folder / part).exists() for folder in folders):
        return remedy
    return None
