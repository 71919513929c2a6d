"""Families of models that the installed transformers has."""

from __future__ import annotations

import transformers
from packaging.version import Version

from longfactory_dev.tiny_models import tiny_config

TESTED = Version("5.23")
"""The transformers of constraints.txt."""


def is_made_here(family: str) -> bool:
    """Whether the transformers that is installed has the family and makes its configuration: one
    that is older than the tests' own has fewer, and refuses fields of some (DBRX).
    """
    if Version(transformers.__version__) >= TESTED:
        return True
    try:
        tiny_config(family)
    except (KeyError, ValueError):
        return False
    return True
