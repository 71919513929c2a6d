"""Triton kernels on GPUs with less shared memory than the 227 KB of those that they were tuned on:
163 KB of an A100, 99 KB of an RTX 4090 or 5090, an RTX 6000 or an L40S.

What a kernel takes depends on its flags, on the GPU's generation and on the version of Triton, and
Triton compares it with what the GPU has before it launches. So nothing is computed here: slower
settings are taken where Triton refuses the fastest.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

log = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=Hashable)

_refused: collections.Counter[Hashable] = collections.Counter()
"""How many of a call's settings the GPU has no room for: to try costs a compilation."""


def run_what_fits(
    call: tuple[Hashable, ...],
    choices: Sequence[Settings],
    run: Callable[[Settings], object],
    refusal: type[Exception],
) -> None:
    """Launches a kernel with the first of its settings that the GPU has room for.

    Args:
        call: the kernel's name, and what it is compiled for, the device included.
        choices: from the fastest on.
        refusal: what Triton raises, before it launches, where there is no room. The last choice's
            is raised.
    """
    key = (call, tuple(choices))
    for place in range(_refused[key], len(choices)):
        try:
            run(choices[place])
            return
        except refusal as error:
            if place == len(choices) - 1:
                raise
            _refused[key] = place + 1
            log.info(
                "%s is launched with %s: with %s, %s", call[0], choices[place + 1], choices[place],
                error,
            )  # fmt: skip
