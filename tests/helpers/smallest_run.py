"""The fewest keys of a training run, and what is told of others beside them."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping

BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere/out"}


def problem(world_size: int | None = None, **keys: Any) -> str:
    """The sentences by which a run with these keys is refused."""
    with pytest.raises(ConfigError) as e:
        from_mapping({**BASE, **keys}, world_size=world_size)
    return str(e.value)
