"""Configurations that an old transformers cannot make."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

REFUSED_BY_5_17 = ("dbrx", "musicgen")
"""Model types whose own defaults the strict dataclasses of transformers 5.17 refuse."""


def makeable(kind: str) -> bool:
    """Whether this transformers makes a model type's default configuration and reads it again. One that is not
    of the known cases raises.
    """
    try:
        kind_of_config = CONFIG_MAPPING[kind]
        kind_of_config.from_dict(kind_of_config().to_dict())
    except Exception:
        if kind not in REFUSED_BY_5_17 or Version(transformers.__version__) >= Version("5.18"):
            raise
        return False
    return True


def skip_unless_makeable(kind: str) -> None:
    if not makeable(kind):
        pytest.skip(f"transformers {transformers.__version__} refuses its own defaults of {kind}")
