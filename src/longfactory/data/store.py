"""The token cache: one folder a data set, written once, read through memory maps.

A store holds every sample as parts (see `assemble`), whole. It depends on the rows, the template
and the tokenizer, and on nothing else: other cut-offs, masks, seeds, mixes, numbers of devices or
sequence-parallel sizes read the same store.

The writer works in a folder beside the final name and renames it, so a store is there completely or
not at all. Its meta.json holds the size and a checksum of every file; one that differs when a run
starts is named, and the store is built again. Of several processes one writes (whoever holds the
lock) and the others look at the disk until it is there: no barrier, no time-out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from longfactory import progress
from longfactory.data.errors import BadRows
from longfactory.data.media import records
from longfactory.data.media.units import MediaUnit
from longfactory.errors import DataError

FORMAT = 3
"""Part of a cache's name: to be raised where the files change, and where rows come to be read
otherwise, since a cache of before would go on being used.
"""
HEAD_START = 5.0  # seconds in which the others leave the building to the first process
TOKENS, ARRAYS = "tokens.i32", ("part_start.npy", "first_part.npy", "flags.npy", "rows.npy")

# flags of a sample
DESIRED, LACKS_THOUGHT, SECOND_LACKS_THOUGHT, LAST_ONLY, EQUAL_PAIR, NO_ANSWER = 1, 2, 4, 8, 16, 32


class Chunk(NamedTuple):
    """One piece of work that a tokenising process hands over: tokens of all parts laid end to end,
    lengths of the parts, number of parts, flags and row numbers of the samples, the rows that were
    bad, and the media of each sample (empty where none has any), spans from the first token of
    their part.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    flags: np.ndarray
    rows: np.ndarray
    bad: BadRows
    media: Sequence[Sequence[MediaUnit]] = ()


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
        self.tokens = _open(self.path / TOKENS, np.int32)
        self.part_start = np.load(self.path / "part_start.npy", mmap_mode="r")
        self.first_part = np.load(self.path / "first_part.npy", mmap_mode="r")
        self.flags = np.load(self.path / "flags.npy", mmap_mode="r")
        self.rows = np.load(self.path / "rows.npy", mmap_mode="r")
        self.records = records.opened(self.path)

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

    def media(self, i: int) -> list[MediaUnit]:
        """The images and videos of sample i, spans from the first token of their part."""
        return self.records.of(i) if self.records is not None else []

    def has_media(self) -> np.ndarray:
        """[samples] bool: whether a sample has images or videos."""
        if self.records is None:
            return np.zeros(len(self), bool)
        return self.records.present()

    def totals(self) -> np.ndarray:
        """[samples] number of tokens of each sample, all parts together."""
        return np.diff(self.part_start[self.first_part])


class MemoryStore(Store):
    """A store in memory, made of one chunk."""

    def __init__(self, chunk: Chunk, name: str):
        self.tokens, self.flags, self.rows, self.bad = (
            chunk.tokens,
            chunk.flags,
            chunk.rows,
            chunk.bad,
        )
        self.part_start, self.first_part = _starts([chunk.lengths]), _starts([chunk.counts])
        self.records = records.InMemory(chunk.media) if any(chunk.media) else None
        self.meta = {"name": name}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def media_of(stores: Sequence[Store], entries: np.ndarray) -> np.ndarray:
    """[n] bool: whether each of [n, >= 2] entries (store, sample) has images or videos."""
    out = np.zeros(len(entries), bool)
    for s, store in enumerate(stores):
        if store.records is not None:
            here = entries[:, 0] == s
            out[here] = store.has_media()[entries[here, 1]]
    return out


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


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Around writes of a cache.

    Raises:
        DataError: the disk takes no more, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The cache {path} cannot be written: {error.strerror or error}. Make room, or name"
            " another folder in the environment variable LONGFACTORY_CACHE."
        ) from error


def private_folder(path: Path) -> Path:
    """The folder, made with its parents where it is not there; others cannot read what is made.

    Raises:
        DataError: it cannot be made.
    """
    with written(path):
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
    return path


def write(path: Path, chunks: Iterable[Chunk], meta: dict[str, Any]) -> None:
    """Writes a store beside `path` and renames it to `path`. An older store of that name is
    replaced. For one process to call (`open_or_build` holds a lock for it).

    Raises:
        DataError: the disk is full, or cannot be written. Nothing is left behind.
    """
    import xxhash

    private_folder(path.parent)
    remove_abandoned(path.parent, path.name)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    lengths, counts, flags, rows, bad = [], [], [], [], BadRows()
    digest = xxhash.xxh3_128()
    try:
        with written(path.parent):
            beside.mkdir(mode=0o700)
            file = (beside / TOKENS).open("wb")
        media = records.Writer(beside)
        try:
            for chunk in chunks:
                data = np.ascontiguousarray(chunk.tokens, dtype=np.int32).data
                digest.update(data)
                with written(path.parent):
                    file.write(data)
                if _lock_file(path).exists():
                    os.utime(_lock_file(path))  # for those who wait (open_or_build)
                with written(path.parent):
                    media.add(chunk.media, len(chunk.flags))
                lengths.append(chunk.lengths)
                counts.append(chunk.counts)
                flags.append(chunk.flags)
                rows.append(chunk.rows)
                bad.merge(chunk.bad)
            with written(path.parent):
                file.close()
                media.close()
        finally:
            with contextlib.suppress(OSError):
                file.close()
        arrays: tuple[np.ndarray, ...] = (
            _starts(lengths),
            _starts(counts),
            np.concatenate([np.zeros(0, np.uint8), *flags]).astype(np.uint8),
            np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64),
        )
        with written(path.parent):
            for name, array in zip(ARRAYS, arrays, strict=True):
                np.save(beside / name, array)
            files = {name: _size_and_digest(beside / name) for name in (*ARRAYS, *media.names)}
            files[TOKENS] = ((beside / TOKENS).stat().st_size, digest.hexdigest())
            facts = meta | {"format": FORMAT, "bad": bad.to_json(), "files": files}
            text = json.dumps(facts, ensure_ascii=False, indent=1)
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


def remove_abandoned(folder: Path, mine: str) -> None:
    """Removes what killed processes left of stores that they were writing: of `mine`, whose lock
    the caller holds, and of others that nobody holds a lock for.
    """
    for beside in folder.glob(".*.*.*"):
        name = beside.name[1:].split(".")[0]
        if not beside.is_dir():
            continue
        if name == mine:
            shutil.rmtree(beside, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), (folder / f".{name}.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(beside, ignore_errors=True)


def _size_and_digest(path: Path) -> tuple[int, str]:
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def damage(path: Path) -> str | None:
    """What is wrong with the store at `path`: a file that is missing, or differs from its size or
    checksum. None where all is right, and for what an older version wrote without checksums.

    Every file is read once.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        BadRows.from_json(meta["bad"])
        files = meta.get("files") or dict.fromkeys((TOKENS, *ARRAYS))
        for name, expected in files.items():
            if expected is None:
                (path / name).stat()
                continue
            size = (path / name).stat().st_size
            if size != expected[0]:
                return f"{name} has {size} bytes, expected {expected[0]}"
            if _size_and_digest(path / name)[1] != expected[1]:
                return f"{name} has a different checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json is damaged"
    return None


def _starts(lengths: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.zeros(1, np.int64), *lengths]).astype(np.int64)
    return np.cumsum(joined)


_looked_at: dict[tuple[Path, int, int], bool] = {}
"""Whether stores are whole, by path, file number and time of their meta.json: each is read once by
a process."""


def exists(path: Path) -> bool:
    """Whether there is a whole store at `path`; of a damaged one it is logged what is wrong."""
    try:
        found = (path / "meta.json").stat()
    except OSError:
        return False
    key = (path, found.st_ino, found.st_mtime_ns)
    if key not in _looked_at:
        problem = damage(path)
        _looked_at[key] = problem is None
        if problem is not None:
            logging.getLogger("longfactory.data").warning(
                f"The cached data {path} are damaged ({problem}) and will be tokenised again."
            )
    return _looked_at[key]


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
    private_folder(path.parent)
    if not first:
        _wait(lambda: exists(path), HEAD_START)
    with written(path.parent):
        opened = _lock_file(path).open("a+")
    with opened as lock:
        if not _locked(lock, lambda: exists(path) and not rebuild, log):
            return Store(path)
        if rebuild or not exists(path):
            with contextlib.suppress(OSError):  # a full disk, which `build` tells of
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            progress.moved("tokenising")
            build(path)
    return Store(path)


def _locked(lock: IO[str], done: Callable[[], bool], log: Callable[[str], None]) -> bool:
    """Waits for the lock; False where what it is for is `done` by another process."""
    started = told = time.monotonic()
    touched = 0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if done():
                return False
        if (when := os.fstat(lock.fileno()).st_mtime_ns) != touched:
            touched = when
            progress.moved(f"waiting for {_holder(lock)} to tokenise")
        now = time.monotonic()
        if now - told > 60:
            log(f"Waiting for another process to tokenise ({(now - started) / 60:.0f} min).")
            told = now
        time.sleep(0.2)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read(200) or "another process"


def _wait(ready: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.1)
