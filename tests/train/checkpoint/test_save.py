"""A save that the disk refuses leaves what was there, and ends in one sentence on every rank."""

from __future__ import annotations

import errno
import os
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longfactory.errors import UserError
from longfactory.testing import run_ranks
from longfactory.train.checkpoint import manifest as manifests
from longfactory.train.checkpoint import save as module
from longfactory.train.checkpoint.save import save_checkpoint


def arguments(out: Path, rank: int = 0) -> Any:
    return types.SimpleNamespace(
        output_dir=str(out),
        should_save=rank == 0,
        save_on_each_node=False,
        process_index=rank,
        local_process_index=rank,
    )


def write(name: str) -> tuple[str, Any]:
    return name, lambda folder: (folder / name).write_text(name)


def full(folder: Path) -> None:
    (folder / "half").write_text("ha")
    raise OSError(errno.ENOSPC, "No space left on device")


FACTS = {"run": "r", "step": 4, "resumable": True}


def test_it_is_whole_and_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "of another run").write_text("")
    final = save_checkpoint(arguments(tmp_path), 4, [write("a"), write("b")], FACTS)
    found, _ = manifests.read(final)
    assert found is not None and list(found["files"]) == ["a", "b"]
    assert sorted(p.name for p in final.iterdir()) == ["a", "b", "longfactory_manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(arguments(tmp_path), 2, [write("a")], FACTS)
    with pytest.raises(UserError) as e:
        save_checkpoint(arguments(tmp_path), 4, [write("a"), ("states", full)], FACTS)
    assert "checkpoint-4 could not be saved (states: No space left on device)" in str(e.value)
    assert "checkpoint-2 is intact" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    save_checkpoint(arguments(tmp_path), 4, [write("a")], FACTS)


def test_free_space_is_looked_at_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=10**9)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"1\.00 GB free, and a checkpoint needs about 2\.00"):
        save_checkpoint(arguments(tmp_path), 4, [], FACTS, bytes_needed=2 * 10**9)
    assert list(tmp_path.iterdir()) == []
    usage.free = 1000
    with pytest.raises(UserError, match=r"1\.00 KB free, .* needs about 0\.12 MB"):
        save_checkpoint(arguments(tmp_path), 4, [], FACTS, bytes_needed=123_456)


def test_a_fault_of_the_program_is_no_sentence(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        save_checkpoint(arguments(tmp_path), 4, [("x", broken)], FACTS)
    assert list(tmp_path.iterdir()) == []


def save_on_ranks(path: str) -> list[str]:
    out, rank = Path(path), dist.get_rank()
    parts = [("a", lambda folder: (folder / f"a{rank}").write_text("x" * (rank + 1)))]
    save_checkpoint(arguments(out, rank), 2, parts, FACTS)
    try:
        failing = full if rank == 1 else lambda folder: None
        save_checkpoint(arguments(out, rank), 4, [*parts, ("states", failing)], FACTS)
    except UserError as error:
        return [str(error)]
    return []


@pytest.mark.processes
def test_every_rank_s_part_is_there_and_every_rank_hears_of_a_failure(tmp_path: Path) -> None:
    told = run_ranks(2, save_on_ranks, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    found, _ = manifests.read(tmp_path / "checkpoint-2")
    assert found is not None and sorted(found["files"]) == ["a0", "a1"]
    assert all("Process 1: " in m and "No space left" in m for (m,) in told)


def test_what_was_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of every file and folder before the rename, and of the folder around it after."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(self: Path, to: Path) -> Path:
        done.append(f"-> {to.name}")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save_checkpoint(arguments(tmp_path), 4, [write("a")], FACTS)
    last = done.index("-> checkpoint-4")
    assert "a" in done[:last] and any(n.startswith("tmp-checkpoint-4-") for n in done[:last])
    assert tmp_path.name in done[last:]


def test_one_of_the_same_step_is_never_there_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(arguments(tmp_path), 4, [write("a")], FACTS)
    removed: list[str] = []
    rmtree = shutil.rmtree

    def remove(path: Path, **options: Any) -> None:
        removed.append(Path(path).name)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    save_checkpoint(arguments(tmp_path), 4, [write("b")], FACTS)
    assert removed and all(name.startswith("tmp-checkpoint-4-") for name in removed)
