"""What a run is, for the manifests of its checkpoints."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

from longfactory.config.folder import RunRecord


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the trainer does not know of its run by itself."""

    record: RunRecord = dataclasses.field(
        default_factory=lambda: RunRecord(uuid.uuid4().hex[:12], "", False)
    )
    configuration: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Every key with its value."""
    sharding: str | None = None
    """none, ddp, fsdp2 or deepspeed."""
    data: str | None = None
    """`data_fingerprint` of the training data."""
