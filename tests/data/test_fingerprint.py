"""The digest of the training data changes with every sample, and with nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from longfactory.data.assemble import Rules
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.errors import BadRows
from longfactory.data.fingerprint import data_fingerprint
from longfactory.data.kinds import ConversationKind
from longfactory.data.store import Chunk, MemoryStore


def data(
    tokens: Any = range(40), order: Any = (0, 1, 2, 3), packed: bool = False, **rules: Any
) -> TokenizedDataset:
    """Four conversations of a question and an answer of five tokens each."""
    arrays = Chunk(
        np.array(tokens, np.int32),
        np.full(8, 5, np.int64),
        np.full(4, 2, np.int64),
        np.zeros(4, np.uint8),
        np.arange(4),
        BadRows(),
    )
    entries = np.array([[0, i] for i in order])
    store = MemoryStore(arrays, "a")
    return TokenizedDataset(
        [store], entries, ConversationKind(), Rules(**{"cutoff": 64, **rules}), packed
    )


def test_it_is_the_same_for_the_same_samples() -> None:
    assert data_fingerprint(data()) == data_fingerprint(data())
    assert data_fingerprint(data(cutoff=32)) == data_fingerprint(data())  # nothing is cut
    assert data_fingerprint([1, 2]) is None


def test_whatever_alters_a_sample_alters_it() -> None:
    one_token = [*range(39), 99]
    found = [
        data(),
        data(one_token),
        data(order=(1, 0, 2, 3)),
        data(order=(0, 1, 2)),
        data(cutoff=8),
        data(cutoff=7),
        data(packed=True, cutoff=40),
        data(packed=True, cutoff=20),
        data(train_on_prompt=True),
        data(mask_history=True),
    ]
    digests = [data_fingerprint(d) for d in found]
    assert len(set(digests)) == len(found), dataclasses.asdict(found[0].rules)
