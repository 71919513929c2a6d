"""Samples to a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longfactory.data.row import Row, TokenizedDocument, make_row

Sample = list[TokenizedDocument]


def collate(samples: Sequence[Sample], multiple: int, pad_id: int) -> Row:
    """One row of all documents of the samples, padded at its end to a multiple of `multiple`
    tokens.

    Documents keep the number of their sample in the data set (reference log-probabilities are
    looked up by it); parents point into the row.
    """
    documents: list[TokenizedDocument] = []
    for sample in samples:
        first = len(documents)
        documents += [
            dataclasses.replace(d, parent=d.parent + first) if d.parent >= 0 else d for d in sample
        ]
    return make_row(documents).padded(multiple, pad_id)
