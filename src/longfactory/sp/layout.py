"""Which tokens of a row each rank holds: integer arithmetic, no tensors' data, no process group."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a row that attend causally to each other and, where there is a parent, to all of the parent.

    `parent` indexes the list of segments, -1 for none. Positions in a segment with a parent go on from the parent's end, which
    is what a sliding window measures.
    """

    start: int
    stop: int
    parent: int = -1
