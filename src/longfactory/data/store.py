"""The token cache: one folder a data set, written once, read through memory maps.

A store holds every sample as parts (see `assemble`), whole. It depends on the rows, the template
and the tokenizer, and on nothing else: other cut-offs, masks, seeds, mixes, numbers of devices or
sequence-parallel sizes read the same store.

The writer works in a folder beside the final name and renames it, so a store is there completely or
not at all. Of several processes one writes (whoever holds the lock) and the others look at the disk
until it is there: no barrier, no time-out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from longfactory import progress
from longfactory.data.errors import BadRows

FORMAT = 2

# flags of a sample
DESIRED, LACKS_THOUGHT, SECOND_LACKS_THOUGHT, LAST_ONLY, EQUAL_PAIR, NO_ANSWER = 1, 2, 4, 8, 16, 32


# One piece of work that a tokenising process hands over: tokens of all parts laid end to end,
# lengths of the parts, number of parts, flags and row numbers of the samples, and the rows that
# were bad.
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, BadRows]


class Store:
    """Read access. Picklable: a worker process opens the files anew.

    `first_part[i]` is the index of sample i's first part, `part_start[p]` the first token of part
    p; both have one entry more than there are samples and parts. `rows[i]` is the number (from 0)
    of the row that sample i comes from.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.meta: dict[str, Any] = json.loads(
            (self.path / "meta.json").read_text(encoding="utf-8")
        )
        self.bad = BadRows.from_json(self.meta["bad"])
        self.tokens = _open(self.path / "tokens.i32", np.int32)
        self.part_start = np.load(self.path / "part_start.npy", mmap_mode="r")
        self.first_part = np.load(self.path / "first_part.npy", mmap_mode="r")
        self.flags = np.load(self.path / "flags.npy", mmap_mode="r")
        self.rows = np.load(self.path / "rows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.flags)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def parts(self, i: int) -> list[np.ndarray]:
        """The parts of sample i, as views of the map."""
        bounds = self.part_start[self.first_part[i] : self.first_part[i + 1] + 1].tolist()
        return [self.tokens[a:b] for a, b in pairwise(bounds)]

    def lengths(self, i: int) -> list[int]:
        """The lengths of sample i's parts."""
        bounds = self.part_start[self.first_part[i] : self.first_part[i + 1] + 1]
        return np.diff(bounds).tolist()

    def totals(self) -> np.ndarray:
        """[samples] number of tokens of each sample, all parts together."""
        return np.diff(self.part_start[self.first_part])


class MemoryStore(Store):
    """A store in memory, made of one chunk."""

    def __init__(self, chunk: Chunk, name: str):
        self.tokens, lengths, counts, self.flags, self.rows, self.bad = chunk
        self.part_start, self.first_part = _starts([lengths]), _starts([counts])
        self.meta = {"name": name}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def total_lengths(stores: Sequence[Store], entries: np.ndarray) -> np.ndarray:
    """[n] int64 tokens of each of [n, >= 2] entries (store, sample), all parts together."""
    return _gather(stores, entries, lambda store, i: store.totals()[i])


def flags_of(stores: Sequence[Store], entries: np.ndarray) -> np.ndarray:
    """[n] int64 flags of each entry."""
    return _gather(stores, entries, lambda store, i: store.flags[i])


def part_lengths(stores: Sequence[Store], entries: np.ndarray, k: int) -> np.ndarray:
    """[n] int64 tokens of the k-th part of each entry."""

    def of(store: Store, i: np.ndarray) -> np.ndarray:
        part = store.first_part[i] + k
        return store.part_start[part + 1] - store.part_start[part]

    return _gather(stores, entries, of)


def _gather(
    stores: Sequence[Store],
    entries: np.ndarray,
    of: Callable[[Store, np.ndarray], np.ndarray],
) -> np.ndarray:
    out = np.zeros(len(entries), np.int64)
    for s, store in enumerate(stores):
        here = entries[:, 0] == s
        out[here] = of(store, entries[here, 1])
    return out


def _open(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def write(path: Path, chunks: Iterable[Chunk], meta: dict[str, Any]) -> None:
    """Writes a store beside `path` and renames it to `path`. An older store of that name is
    replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    lengths, counts, flags, rows, bad = [], [], [], [], BadRows()
    try:
        with (beside / "tokens.i32").open("wb") as f:
            for tokens, part_lengths, part_counts, chunk_flags, chunk_rows, chunk_bad in chunks:
                f.write(np.ascontiguousarray(tokens, dtype=np.int32).data)
                if _lock_file(path).exists():
                    os.utime(_lock_file(path))  # for those who wait (open_or_build)
                lengths.append(part_lengths)
                counts.append(part_counts)
                flags.append(chunk_flags)
                rows.append(chunk_rows)
                bad.merge(chunk_bad)
        np.save(beside / "part_start.npy", _starts(lengths))
        np.save(beside / "first_part.npy", _starts(counts))
        np.save(
            beside / "flags.npy", np.concatenate([np.zeros(0, np.uint8), *flags]).astype(np.uint8)
        )
        np.save(
            beside / "rows.npy", np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
        )
        text = json.dumps(
            meta | {"format": FORMAT, "bad": bad.to_json()}, ensure_ascii=False, indent=1
        )
        (beside / "meta.json").write_text(text, encoding="utf-8")
        if path.exists():
            old = path.with_name(beside.name + ".old")
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _starts(lengths: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.zeros(1, np.int64), *lengths]).astype(np.int64)
    return np.cumsum(joined)


def exists(path: Path) -> bool:
    return (path / "meta.json").exists()


def open_or_build(
    path: Path,
    build: Callable[[Path], None],
    *,
    rebuild: bool = False,
    first: bool = True,
    log: Callable[[str], None] = lambda text: None,
) -> Store:
    """The store at `path`, built by one process while the others wait.

    Any process may come first; one that is not `first` (rank 0 of its node) lets it go ahead. If
    the builder dies, its lock falls, since the processes that it has started die with it, and the
    next process builds. While it works it touches the lock's file; a builder that does not move
    (stopped, or on a machine that is lost) is a start-up that does not move, and its time limit
    ends it. `rebuild` builds again although the store is there.
    """
    if exists(path) and not rebuild:
        return Store(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not first:
        _wait(lambda: exists(path), 5.0)
    started = told = time.monotonic()
    touched = 0
    with _lock_file(path).open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if exists(path) and not rebuild:
                    return Store(path)
                if (when := os.fstat(lock.fileno()).st_mtime_ns) != touched:
                    touched = when
                    progress.moved(f"waiting for {_holder(lock)} to tokenise")
                now = time.monotonic()
                if now - told > 60:
                    log(
                        f"Waiting for another process to tokenise ({(now - started) / 60:.0f} min)."
                    )
                    told = now
                time.sleep(0.2)
        if rebuild or not exists(path):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            progress.moved("tokenising")
            build(path)
    return Store(path)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read(200) or "another process"


def _wait(ready: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.1)
