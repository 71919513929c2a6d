"""The newest whole checkpoint of the run is chosen; what is damaged is named and passed over."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longfactory.config import RunConfig, from_mapping
from longfactory.config.folder import (
    MANIFEST,
    RESTARTS,
    STATE_FILE,
    RunRecord,
    configuration_digest,
    read_record,
    write_record,
)
from longfactory.errors import ConfigError, UserError
from longfactory.train.checkpoint import choose
from longfactory.train.checkpoint import manifest as manifests
from longfactory.train.checkpoint.choose import _here, _places, choose_start


def config(out: Path, **keys: Any) -> RunConfig:
    return from_mapping({"model_name_or_path": "m", "dataset": "a", "output_dir": str(out), **keys})


def make(
    out: Path, step: int, run: str | None = "r", resumable: bool = True, state: bool = True
) -> Path:
    """A checkpoint of few bytes; `run` None: without a manifest."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"w": torch.zeros(4)}, folder / "model.safetensors")
    if resumable:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"x": torch.zeros(9)}, folder / name)
    if run is not None:
        if state:
            (folder / STATE_FILE).write_text(json.dumps({"format": 2}))
        files = manifests.measure(folder, manifests.list_files(folder))
        facts = {"run": run, "step": step, "resumable": resumable}
        manifests.write(folder, facts, files)
    return folder


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LOCAL_RANK", "WORLD_SIZE", *RESTARTS):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "out"


def chosen(out: Path, **keys: Any) -> str | None:
    start = choose_start(config(out, **keys))
    return None if start.checkpoint is None else Path(start.checkpoint).name


def damage(path: Path, how: str) -> None:
    good = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        path.write_bytes(bytes([*good[:-3], good[-3] ^ 4, *good[-2:]]))
    else:
        path.write_bytes(good[: len(good) // 2] if how == "truncated" else b"")


FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated", "empty"])
@pytest.mark.parametrize("name", [*FILES, STATE_FILE, MANIFEST])
def test_a_damaged_one_is_named_and_passed_over(
    name: str, how: str, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(out, 2), make(out, 4)
    assert chosen(out) == "checkpoint-4"
    damage(out / "checkpoint-4" / name, how)
    write_record(out, RunRecord("r", "", False))  # one without a manifest does not say whose it is
    with caplog.at_level(logging.WARNING, "longfactory"):
        assert chosen(out) == "checkpoint-2"
    # without the mark that it was written to its end it is left out before
    if (name, how) != ("trainer_state.json", "missing"):
        assert "checkpoint-4 is damaged" in caplog.text and name in caplog.text
    with pytest.raises((UserError, ConfigError)) as e:
        choose_start(config(out, resume_from_checkpoint=str(out / "checkpoint-4")))
    assert "checkpoint-4" in str(e.value) and name in str(e.value)


@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_one_without_a_manifest_is_looked_at_as_far_as_it_goes(
    name: str, how: str, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(out, 2, run=None), make(out, 4, run=None)
    with caplog.at_level(logging.WARNING, "longfactory"):
        assert chosen(out) == "checkpoint-4"
    assert "checkpoint-4 has no" in caplog.text
    damage(out / "checkpoint-4" / name, how)
    assert chosen(out) == "checkpoint-2"


def test_a_flipped_bit_of_an_old_torch_file_is_found(out: Path) -> None:
    make(out, 2, run=None), make(out, 4, run=None)
    path = out / "checkpoint-4" / "optimizer.pt"
    good = path.read_bytes()
    at = good.index(bytes(36))  # the tensor
    path.write_bytes(good[:at] + b"\x01" + good[at + 1 :])
    assert chosen(out) == "checkpoint-2"


def test_weights_alone_are_no_place_to_go_on_from(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(out, 2), make(out, 4, resumable=False), make(out, 6, run=None, resumable=False)
    with caplog.at_level(logging.WARNING, "longfactory"):
        assert chosen(out) == "checkpoint-2"
    assert caplog.text.count("holds only weights") == 2
    with pytest.raises(UserError, match="holds only weights"):
        choose_start(config(out, resume_from_checkpoint=str(out / "checkpoint-4")))


def test_where_none_is_left_the_run_begins_anew_unless_it_must_resume(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(make(out, 2) / "optimizer.pt", "truncated")
    with caplog.at_level(logging.WARNING, "longfactory"):
        assert chosen(out) is None
    assert "the run begins anew" in caplog.text
    with pytest.raises(UserError, match="needs an intact checkpoint"):
        choose_start(config(out, resume_from_checkpoint=True))


def test_machines_may_have_their_folders_elsewhere(out: Path) -> None:
    other = out.parent / "other"
    make(out, 2), make(other, 2)
    places = _places(config(out))
    assert places == [("output_dir", "checkpoint-2")]
    assert _here(config(other), places) == [str(other / "checkpoint-2")]
    asked = _places(config(out.parent / "x", resume_from_checkpoint=str(out / "checkpoint-2")))
    there = config(out.parent / "y", resume_from_checkpoint=str(other / "checkpoint-2"))
    assert _here(there, asked) == [str(other / "checkpoint-2")]


# ---- which run a folder holds --------------------------------------------------------------------


def begin(out: Path, cfg: RunConfig, finished: bool = False) -> RunRecord:
    """As a run does at its start."""
    record = choose_start(cfg).record
    out.mkdir(exist_ok=True)
    write_record(out, RunRecord(record.run, record.configuration, finished, record.ancestors))
    assert read_record(out) is not None
    return record


def test_overwriting_means_the_first_start(out: Path) -> None:
    make(out, 9, run="earlier")
    keys = {"overwrite_output_dir": True}
    first = begin(out, config(out, **keys))
    assert config(out, **keys).checkpoints == ()  # killed before it saved
    make(out, 2, run=first.run)
    assert chosen(out, **keys) == "checkpoint-2"
    assert begin(out, config(out, **keys)).run == first.run
    assert chosen(out, **keys, learning_rate=0.5) is None  # another command
    assert chosen(out, **keys, resume_from_checkpoint=False) is None
    begin(out, config(out, **keys), finished=True)
    assert chosen(out, **keys) is None


@pytest.mark.parametrize("name", RESTARTS)
def test_a_launcher_s_restart_never_begins_anew(
    name: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"resume_from_checkpoint": False}
    first = begin(out, config(out, **keys))
    make(out, 2, run=first.run)
    assert chosen(out, **keys) is None
    monkeypatch.setenv(name, "0")
    assert chosen(out, **keys) is None
    monkeypatch.setenv(name, "1")
    assert chosen(out, **keys) == "checkpoint-2"


def test_a_named_checkpoint_means_the_first_start(out: Path) -> None:
    """Going back to an earlier checkpoint: those after it are of another past."""
    first = begin(out, config(out))
    for step in (2, 4, 6):
        make(out, step, run=first.run)
    keys = {"resume_from_checkpoint": str(out / "checkpoint-4")}
    back = begin(out, config(out, **keys))
    assert back.run != first.run and back.ancestors == ((first.run, 4),)
    assert chosen(out, **keys) == "checkpoint-4"
    make(out, 5, run=back.run)
    assert chosen(out, **keys) == "checkpoint-5"
    assert [Path(p).name for p in config(out).checkpoints] == [f"checkpoint-{n}" for n in (5, 4, 2)]


def test_a_run_keeps_its_name_when_it_goes_on(out: Path) -> None:
    make(out, 2, run=None)
    first = begin(out, config(out))
    assert first.ancestors == ((None, 2),)
    assert begin(out, config(out)).run == first.run
    make(out, 4, run=first.run)
    assert begin(out, config(out, learning_rate=0.1)).run == first.run


def test_a_run_killed_while_it_wrote_its_results_goes_on(out: Path) -> None:
    """Without checkpoints, where another finished run would be refused."""
    begin(out, config(out))
    (out / "adapter_model.safetensors").write_text("")
    assert config(out).checkpoints == ()
    record = read_record(out)
    assert record is not None and record.configuration == configuration_digest(config(out))
    write_record(out, RunRecord(record.run, record.configuration, True))
    with pytest.raises(ConfigError, match="holds a finished run"):
        config(out)


def test_machines_that_find_other_checkpoints_take_none(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of their own, and the second machine's of that name is of another step."""
    folder = make(out, 4)
    seen = [(True, None, 4), (True, None, 6)]
    monkeypatch.setattr(choose, "from_all", lambda mine: seen if mine == seen[0] else [mine])
    _, problems, _ = choose._examine(folder)
    assert problems == [
        "the processes do not find the same there: process 0 finds step 4, process 1 finds step 6"
    ]
