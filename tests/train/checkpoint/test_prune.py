"""`save_total_limit`: what counts, what stays, in which order, and leftovers of killed runs."""

from __future__ import annotations

import os
from pathlib import Path

from longfactory.config.folder import MANIFEST, RunRecord
from longfactory.train.checkpoint import manifest as manifests
from longfactory.train.checkpoint.prune import prune, remove_leftovers, temporary_name

RECORD = RunRecord("mine", "", False)


def make(out: Path, step: int, run: str = "mine", mtime: float | None = None) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345678")
    files = manifests.measure(folder, manifests.list_files(folder))
    manifests.write(folder, {"run": run, "step": step}, files)
    if mtime is not None:
        os.utime(folder, (mtime, mtime))
    return folder


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


def test_the_oldest_go_whatever_the_times_of_the_files(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        make(tmp_path, step, mtime=1e9 - step)
    assert prune(tmp_path, None, RECORD, None, 10) == []
    assert prune(tmp_path, 2, RECORD, None, 10) == ["checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4"]


def test_the_best_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    assert prune(tmp_path, 1, RECORD, str(tmp_path / "checkpoint-2"), 8) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-8"]


def test_damaged_ones_neither_count_nor_go(tmp_path: Path) -> None:
    """With a limit of 1 the last good one must not make room for a damaged newer one."""
    make(tmp_path, 2)
    (make(tmp_path, 4) / "model.safetensors").write_bytes(b"1234")
    (make(tmp_path, 6) / MANIFEST).unlink()
    (tmp_path / "checkpoint-8").mkdir()
    assert prune(tmp_path, 1, RECORD, None, 2) == []
    make(tmp_path, 10)
    assert prune(tmp_path, 1, RECORD, None, 10) == ["checkpoint-2"]
    assert names(tmp_path) == [f"checkpoint-{n}" for n in (10, 4, 6, 8)]


def test_a_later_one_that_was_passed_over_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    """A flipped bit, which its size does not tell: the run went on from checkpoint-4."""
    for step in (2, 4, 5):
        make(tmp_path, step)
    (make(tmp_path, 8) / "model.safetensors").write_bytes(b"12345679")
    assert prune(tmp_path, 1, RECORD, None, 5) == ["checkpoint-2", "checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-8"]


def test_those_of_an_earlier_run_go_first(tmp_path: Path) -> None:
    make(tmp_path, 100, "other")
    make(tmp_path, 200, "other")
    make(tmp_path, 2)
    make(tmp_path, 4)
    assert prune(tmp_path, 3, RECORD, None, 4) == ["checkpoint-100"]
    assert prune(tmp_path, 1, RECORD, None, 4) == ["checkpoint-200", "checkpoint-2"]


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    ours = [temporary_name(7), ".longfactory-dry-save-abc"]
    theirs = ["tmp-checkpoint-7", "tmp-checkpoint-x-0123456789ab", "tmp", "checkpoint-7"]
    for name in (*ours, *theirs):
        (tmp_path / name / "inner").mkdir(parents=True)
    assert remove_leftovers(tmp_path) == sorted(ours)
    assert names(tmp_path) == sorted(theirs)
    assert remove_leftovers(tmp_path / "absent") == []
