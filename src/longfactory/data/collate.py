"""Samples to a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longfactory.data.row import Row, TokenizedDocument, make_row

Sample = list[TokenizedDocument]


def collate(samples: Sequence[Sample], multiple: int, pad_id: int) -> Row:
    """One row of all documents of the samples, padded at its end to a multiple of `multiple` tokens.

    Sample numbers are counted anew inside the row (0, 1, ...; documents of one sample keep together), and parents point into it.
    """
    documents: list[TokenizedDocument] = []
    numbers: dict[tuple[int, int], int] = {}
    for s, sample in enumerate(samples):
        first = len(documents)
        for d in sample:
            number = numbers.setdefault((s, d.sample), len(numbers))
            parent = d.parent + first if d.parent >= 0 else -1
            documents.append(dataclasses.replace(d, sample=number, parent=parent))
    return make_row(documents).padded(multiple, pad_id)
