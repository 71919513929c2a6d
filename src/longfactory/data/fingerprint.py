"""A digest of the samples that a run trains on, by which a checkpoint knows them again: their
tokens, their order before the shuffle, how they are cut, masked and packed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from longfactory.data import prepare
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.media import records
from longfactory.data.rollouts import RolloutDataset
from longfactory.data.store import Store
from longfactory.data.stream import StreamedDataset

READ_WHOLE = 1 << 30
"""A stream's file with at most this many bytes is read whole; of a longer one its length, and
`_CHUNKS` evenly spaced chunks.
"""
_CHUNKS, _CHUNK = 256, 1 << 16
_CUTTING = ("cutoff", "strategy", "prefix")
_BLOCK = 1 << 24


def data_fingerprint(data: Any) -> str | None:
    """The digest of a training data set. None for data sets of other kinds.

    Of a tokenised data set every token is read. `cutoff_len` and the like count only
    where they change a sample.
    """
    if isinstance(data, TokenizedDataset):
        return _of_tokenised(data)
    if isinstance(data, RolloutDataset):
        return data.fingerprint()
    return _of_stream(data) if isinstance(data, StreamedDataset) else None


def _of_tokenised(data: TokenizedDataset) -> str:
    digest = xxhash.xxh3_128()
    for store in data.stores:
        _add_store(digest, store)
    for array in (data.entries, np.asarray(data.lengths), *(data.bins or [])):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    cuts = data.report.truncated or data.report.dropped
    rules = dataclasses.asdict(data.rules)
    kept = {name: value for name, value in rules.items() if cuts or name not in _CUTTING}
    digest.update(json.dumps([data.kind.name, kept], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _add_store(digest: Any, store: Store) -> None:
    for array in (store.tokens, store.part_start, store.first_part, store.flags):
        flat = np.asarray(array).reshape(-1)
        step = max(1, _BLOCK // flat.itemsize)
        for start in range(0, len(flat), step):
            digest.update(np.ascontiguousarray(flat[start : start + step]).data)
    if store.records is not None:
        for fact in records.facts(store.records, len(store)):
            digest.update(fact.encode())


def _of_stream(data: StreamedDataset) -> str:
    facts = [
        *(prepare.key(p, None, content=_files(p)) for p in data.preparers),
        *(data.packed, data.window if data.packed else None, data.buffer_size, data.mix),
        *(list(data.probabilities or ()), data.seed, data.skip),
        dataclasses.asdict(data.rules),
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())


def _files(preparer: prepare.Preparer) -> str:
    source = preparer.source
    if source.load_from != "file":
        return prepare.fingerprint(source)
    digest = xxhash.xxh3_128()
    for path in source.files():
        _add_file(digest, path)
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as f:
        if size <= READ_WHOLE:
            while block := f.read(_BLOCK):
                digest.update(block)
            return
        for i in range(_CHUNKS):
            f.seek((size - _CHUNK) * i // (_CHUNKS - 1))
            digest.update(f.read(_CHUNK))
