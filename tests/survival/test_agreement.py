"""Ranks that differ are named with both values; a folder belongs to one run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longfactory.config import RunConfig, from_mapping
from longfactory.errors import UserError
from longfactory.train.survival import agreement
from longfactory.train.survival.agreement import agree, differences, facts, refusal
from longfactory.train.survival.board import Board
from longfactory.train.survival.lock import FILE, FolderLock

TOKEN = "hf_aSecretThatNobodyMayRead"


def config(folder: Path, **keys: Any) -> RunConfig:
    given = {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(folder / "talks.json"),
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "hub_token": TOKEN,
        "hf_hub_token": TOKEN,
    }
    folder.mkdir(exist_ok=True)
    data = folder / "talks.json"
    if not data.exists():
        data.write_text('[{"instruction": "a", "output": "b"}]')
    return from_mapping(given | keys)


def test_what_differs_is_told_by_rank_and_key(tmp_path: Path) -> None:
    first = facts(config(tmp_path / "a", learning_rate=1e-3))
    second = facts(config(tmp_path / "a", learning_rate=2e-3, seed=7))
    lines = differences([first, second, first], ["here", "there", "here"])
    assert sorted(lines) == [
        "learning_rate: 0.002 on rank 1 (there), 0.001 on rank 0 (here)",
        "seed: 7 on rank 1 (there), not set on rank 0 (here)",
    ]
    assert TOKEN not in str(first) and not {"hub_token", "hf_hub_token"} & set(first)
    assert "nothing was loaded" in refusal(lines)


def test_folders_may_differ_and_what_is_in_them_may_not(tmp_path: Path) -> None:
    one = facts(config(tmp_path / "a", nproc_per_node=4))
    two = facts(config(tmp_path / "b", nproc_per_node=8, dataset=str(tmp_path / "a/talks.json")))
    for found in (one, two):
        found.pop("dataset", None)
        found.pop("model_name_or_path", None)
    assert differences([one, two], ["x", "y"]) == []
    (tmp_path / "a" / "talks.json").write_text('[{"instruction": "a", "output": "c"}]')
    three = facts(config(tmp_path / "a", nproc_per_node=4))
    assert "talks.json: " in differences([one, three], ["x", "y"])[0]


def test_all_ranks_hear_the_same(tmp_path: Path) -> None:
    store = dist.HashStore()
    said: dict[int, str] = {}

    def rank(number: int) -> None:
        cfg = config(tmp_path / "a", seed=1 if number == 2 else 0)
        try:
            agree(cfg, Board(store, number, 3))  # type: ignore[arg-type]
            said[number] = ""
        except UserError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert len(set(said.values())) == 1 and "seed: 1 on rank 2" in said[0]


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    lock = FolderLock(out)
    with pytest.raises(UserError, match=f"in use by another run \\(process {os.getpid()} on"):
        FolderLock(out)
    lock.release()
    assert not out.exists()  # it was made for the lock alone
    again = FolderLock(out)
    (out / "result").write_text("")
    again.release()
    assert [p.name for p in out.iterdir()] == ["result"]


def _hold(folder: Path, taken: Any) -> None:
    import time

    lock = FolderLock(folder)
    taken.set()
    time.sleep(60)
    lock.release()


@pytest.mark.processes
def test_the_lock_falls_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, taken))
    holder.start()
    assert taken.wait(20)
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        FolderLock(tmp_path)
    holder.kill()
    holder.join()
    assert (tmp_path / FILE).exists()  # nobody could remove it
    FolderLock(tmp_path).release()
    assert not (tmp_path / FILE).exists()


@pytest.mark.processes
def test_the_first_steps_of_the_command_need_no_torch() -> None:
    names = "signals, launched, lock, board, words, watch, stopping, start"
    code = (
        f"import sys; from longfactory.train.survival import {names}; assert 'torch' not in"
        " sys.modules; from longfactory import cli, launch; assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


def test_a_fact_that_a_rank_lacks_differs() -> None:
    assert differences([{"a": "1"}, {}], ["x", "y"]) == [
        "a: not set on rank 1 (y), 1 on rank 0 (x)"
    ]


def test_a_long_file_is_compared_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "WHOLE", 16)
    monkeypatch.setattr(agreement, "ENDS", 4)
    found = []
    for text in ("a" * 40, "b" + "a" * 39, "a" * 39 + "b"):
        (tmp_path / "x").write_text(text)
        found.append(agreement.digest(tmp_path / "x"))
    assert len(set(found)) == 3
