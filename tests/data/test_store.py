"""The token cache with several processes: one builds, all read, and a builder that dies leaves
nothing behind.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from longfactory.data import store
from longfactory.data.errors import BadRows
from longfactory.data.store import Chunk, Store
from longfactory.errors import DataError


def chunk(first: int, samples: int) -> Chunk:
    """Samples of two parts each, of 1 and i tokens."""
    parts = [np.full(n, first + i, np.int32) for i in range(samples) for n in (1, i)]
    lengths = np.array([len(p) for p in parts], np.int64)
    bad = BadRows()
    bad.add("f:1", "empty answer")
    return Chunk(
        np.concatenate(parts),
        lengths,
        np.full(samples, 2, np.int64),
        np.zeros(samples, np.uint8),
        np.arange(first, first + samples, dtype=np.int64),
        bad,
    )


def test_parts_come_back(tmp_path: Path) -> None:
    store.write(tmp_path / "s", [chunk(0, 3), chunk(100, 2)], {"name": "d", "rows": 7})
    s = Store(tmp_path / "s")
    assert len(s) == 5 and s.totals().tolist() == [1, 2, 3, 1, 2]
    assert [p.tolist() for p in s.parts(2)] == [[2], [2, 2]] and s.lengths(4) == [1, 1]
    assert [p.tolist() for p in s.parts(3)] == [[100], []]
    assert s.bad.count == 2 and s.rows.tolist() == [0, 1, 2, 100, 101] and s.meta["rows"] == 7


def test_an_empty_store(tmp_path: Path) -> None:
    store.write(tmp_path / "s", [], {"name": "d", "rows": 0})
    assert len(Store(tmp_path / "s")) == 0 and Store(tmp_path / "s").totals().tolist() == []


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield chunk(0, 2)
        raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        store.write(tmp_path / "s", broken(), {})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def _rank(path: Path, rank: int, log: Path, die: bool) -> None:
    def build(target: Path) -> None:
        with log.open("a") as f:
            f.write(f"{rank}\n")
        time.sleep(0.5)
        if die and rank == 0:
            os._exit(1)
        store.write(target, [chunk(0, 50)], {"name": "d", "rows": 50})

    assert len(store.open_or_build(path, build, first=rank == 0)) == 50


def _run(path: Path, log: Path, die: bool, ranks: int = 4) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(path, r, log, die)) for r in range(ranks)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    return [p.exitcode for p in processes]


@pytest.mark.processes
def test_one_process_builds_and_all_read(tmp_path: Path) -> None:
    assert _run(tmp_path / "s", tmp_path / "log", die=False) == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "0\n"


@pytest.mark.processes
def test_if_the_builder_dies_another_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "HEAD_START", 1.0)
    assert _run(tmp_path / "s", tmp_path / "log", die=True) == [1, 0, 0, 0]
    builders = (tmp_path / "log").read_text().split()
    assert builders[0] == "0" and len(builders) == 2


def test_a_rebuild_does_not_disturb_readers(tmp_path: Path) -> None:
    store.write(tmp_path / "s", [chunk(0, 3)], {"name": "d", "rows": 3})
    reader = Store(tmp_path / "s")
    rebuilt = store.open_or_build(
        tmp_path / "s",
        lambda p: store.write(p, [chunk(50, 4)], {"name": "d", "rows": 4}),
        rebuild=True,
    )
    assert len(rebuilt) == 4 and [p.tolist() for p in reader.parts(1)] == [[1], [1]]


# -- damage, disks, what is left behind ------------------------------------------------------------


def small_store(path: Path) -> Path:
    chunk = Chunk(
        np.arange(60, dtype=np.int32),
        np.full(6, 10, np.int64),
        np.full(3, 2, np.int64),
        np.zeros(3, np.uint8),
        np.arange(3),
        BadRows(),
    )
    store.write(path, [chunk], {"name": "x"})
    return path


def builds(path: Path) -> list[Path]:
    made: list[Path] = []

    def build(p: Path) -> None:
        made.append(p)
        small_store(p)

    store._looked_at.clear()
    opened = store.open_or_build(path, build)
    assert opened.tokens.tolist() == list(range(60)) and len(opened) == 3
    return made


FILES = ["tokens.i32", "part_start.npy", "first_part.npy", "flags.npy", "rows.npy", "meta.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped", "longer"])
def test_a_damaged_store_is_built_again(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = small_store(tmp_path / "key")
    assert builds(path) == []
    file = path / name
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "longer":
        file.write_bytes(data + b"\1")
    else:
        at = len(data) // 2
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
    caplog.set_level(logging.WARNING, "longfactory.data")
    logging.getLogger("longfactory").propagate = True
    same = name == "meta.json" and how == "flipped" and store.damage(path) is None
    assert builds(path) == ([] if same else [path])
    if name != "meta.json":
        assert name in caplog.text and "damaged" in caplog.text
    assert builds(path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key.lock", "key"]


def test_a_store_of_an_older_version_has_no_checksums(tmp_path: Path) -> None:
    path = small_store(tmp_path / "key")
    meta = json.loads((path / "meta.json").read_text())
    del meta["files"]
    (path / "meta.json").write_text(json.dumps(meta))
    assert builds(path) == []
    (path / "rows.npy").unlink()
    assert builds(path) == [path]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """Of the same store, and of others whose lock nobody holds."""
    for name in (".key.12345.aaaaaaaa", ".other.12345.bbbbbbbb", ".busy.1.cccccccc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.i32").write_bytes(b"x" * 100)
    for name in ("other", "busy"):
        (tmp_path / f".{name}.lock").touch()
    with (tmp_path / ".busy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert builds(tmp_path / "key") == [tmp_path / "key"]
    left = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert left == [".busy.1.cccccccc", "key"]


def test_a_full_disk_is_a_sentence_and_the_next_start_works(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for it: a write beyond it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DataError, match=r"cache .* cannot be written: File too large"):
            builds(tmp_path / "sub" / "key")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "sub").iterdir()] == [".key.lock"]
    assert builds(tmp_path / "sub" / "key") == [tmp_path / "sub" / "key"]


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/x"])
def test_a_cache_that_cannot_be(place: str) -> None:
    with pytest.raises(DataError, match="LONGFACTORY_CACHE"):
        builds(Path(place) / "key")


def test_others_cannot_read_the_cache(tmp_path: Path) -> None:
    path = small_store(tmp_path / "a" / "b" / "key")
    for folder in (path, path.parent, path.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
