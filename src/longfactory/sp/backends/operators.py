"""PyTorch's private operators, called by the names of their arguments.

Their schemas change between releases. A positional call would then hand one argument to another's
place without a word; a call by name is refused here, with a sentence, before anything runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def call(name: str, **arguments: Any) -> Any:
    """torch.ops.aten.<name>(**arguments).

    Raises:
        RuntimeError: this PyTorch has no such operator, or its arguments are not those that are
            given.
    """
    operator, problem = _operator(name, frozenset(arguments))
    if problem is not None:
        raise RuntimeError(problem)
    return operator(**arguments)


@functools.cache
def _operator(name: str, given: frozenset[str]) -> tuple[Any, str | None]:
    """The operator, and what is wrong with calling it with these arguments."""
    operator = getattr(torch.ops.aten, name, None)
    if operator is None:
        return None, f"PyTorch {torch.__version__} has no operator {name}"
    arguments = operator.default._schema.arguments
    unknown = given - {a.name for a in arguments}
    missing = {a.name for a in arguments if not a.has_default_value()} - given
    if unknown or missing:
        found = (
            f"it has no {', '.join(sorted(unknown))}"
            if unknown
            else f"it also needs {', '.join(sorted(missing))}"
        )
        return (
            None,
            (
                f"the operator {name} of PyTorch {torch.__version__} has other arguments than"
                f" expected: {found}"
            ),
        )
    return operator.default, None
