"""The token cache with several processes: one builds, all read, and a builder that dies leaves
nothing behind.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from longfactory.data import store
from longfactory.data.errors import BadRows
from longfactory.data.store import Chunk, Store


def chunk(first: int, samples: int) -> Chunk:
    """Samples of two parts each, of 1 and i tokens."""
    parts = [np.full(n, first + i, np.int32) for i in range(samples) for n in (1, i)]
    lengths = np.array([len(p) for p in parts], np.int64)
    bad = BadRows()
    bad.add("f:1", "empty answer")
    return (
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
def test_if_the_builder_dies_another_builds(tmp_path: Path) -> None:
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
