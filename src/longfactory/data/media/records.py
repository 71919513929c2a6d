"""Media of a token cache: a record of JSON for each sample that has any, and a file of encoded
bytes for media that stand in rows. Nothing decoded is stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from longfactory.data.media.units import (
    BYTES_FILE,
    MediaReference,
    MediaUnit,
    from_json,
    to_json,
)

RECORDS, STARTS = "media.jsonl", "media_start.npy"


class Records(Protocol):
    """The media of the samples of a store."""

    def of(self, i: int) -> list[MediaUnit]:
        """Those of sample i, spans from the first token of their part."""

    def present(self) -> np.ndarray:
        """[samples] bool: whether a sample has any."""


class OnDisk:
    """Records of a folder. `start[i]` is the first byte of sample i's record."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.start = np.load(folder / STARTS, mmap_mode="r")
        self.bytes = np.memmap(folder / RECORDS, dtype=np.uint8, mode="r")

    def of(self, i: int) -> list[MediaUnit]:
        a, b = int(self.start[i]), int(self.start[i + 1])
        found = json.loads(self.bytes[a:b].tobytes()) if b > a else []
        return [from_json(unit, self.folder) for unit in found]

    def present(self) -> np.ndarray:
        return np.diff(self.start) > 0


class InMemory:
    """Records of one chunk."""

    def __init__(self, media: Sequence[Sequence[MediaUnit]]):
        self.media = media

    def of(self, i: int) -> list[MediaUnit]:
        return list(self.media[i])

    def present(self) -> np.ndarray:
        return np.array([bool(units) for units in self.media], bool)


def opened(folder: Path) -> Records | None:
    """The records of a store; None where no sample has media."""
    return OnDisk(folder) if (folder / STARTS).exists() else None


class Writer:
    """Writes the records of a store as its chunks come. A store without media gets no files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lengths: list[int] = []
        self.records: IO[bytes] | None = None
        self.encoded: IO[bytes] | None = None
        self.used = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The files that were written."""
        if self.records is None:
            return ()
        return (RECORDS, STARTS) if self.encoded is None else (RECORDS, STARTS, BYTES_FILE)

    def add(self, media: Sequence[Sequence[MediaUnit]], samples: int) -> None:
        """The media of a chunk of so many samples."""
        if not any(media):
            self.lengths += [0] * samples
            return
        if self.records is None:
            self.records = (self.folder / RECORDS).open("wb")
        for units in media:
            found = [
                to_json(dataclasses.replace(u, reference=self._kept(u.reference))) for u in units
            ]
            text = json.dumps(found, ensure_ascii=False).encode() + b"\n" if found else b""
            self.records.write(text)
            self.lengths.append(len(text))

    def _kept(self, reference: MediaReference) -> MediaReference:
        """The reference with its bytes in the file of the store."""
        if reference.frames:
            return dataclasses.replace(
                reference, frames=tuple(self._kept(frame) for frame in reference.frames)
            )
        if not reference.data:
            return reference
        if self.encoded is None:
            self.encoded = (self.folder / BYTES_FILE).open("wb")
        self.encoded.write(reference.data)
        start, self.used = self.used, self.used + len(reference.data)
        return dataclasses.replace(
            reference, path="", data=b"", offset=start, length=len(reference.data)
        )

    def close(self) -> None:
        for file in (self.records, self.encoded):
            if file is not None:
                file.close()
        if self.records is not None:
            np.save(self.folder / STARTS, np.cumsum([0, *self.lengths], dtype=np.int64))


def facts(records: Records, samples: int) -> Iterator[str]:
    """What tells the media of a store from others, without the folders that they stand in."""
    for i in np.flatnonzero(records.present()[:samples]).tolist():
        for unit in records.of(i):
            names = [Path(r.path).name for r in (unit.reference, *unit.reference.frames)]
            sizes = [(r.size, r.length) for r in (unit.reference, *unit.reference.frames)]
            yield repr((i, unit.part, unit.kind, unit.grid, unit.spans, names, sizes))
