"""Samples of the data as training sees them, with their masks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from longfactory.config import load_config
from longfactory.data.module import cache_root
from longfactory.data.samples import DecodedDocument, Part
from longfactory.errors import UserError
from longfactory.webui import preview as previews
from longfactory.webui.folders import Folders
from longfactory.webui.preview import preview
from small_runs import text, write_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGFACTORY_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model", 0)
    random.seed(0)
    rows = [{"instruction": f"say {i}", "output": text(20 + i)} for i in range(100)]
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    info = {"talks": {"file_name": "talks.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def words(home: Path, **changes: object) -> list[str]:
    given = {
        "model_name_or_path": home / "model",
        "dataset_dir": home,
        "dataset": "talks",
        "template": "chatml",
        "output_dir": home / "out",
        "cutoff_len": 256,
    } | changes
    return [f"{name}={value}" for name, value in given.items()]


def test_trained_tokens_are_marked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = preview(load_config(words(home)), Folders([home]))
    assert "64 samples" in found["report"]
    which = {sample["which"]: sample for sample in found["samples"]}
    assert set(which) == {"first", "longest", "random"}
    parts = which["first"]["documents"][0]["parts"]
    trained = "".join(p["text"] for p in parts if p["trained"])
    other = "".join(p["text"] for p in parts if not p["trained"])
    rows = json.loads((home / "talks.json").read_text())
    assert trained == rows[0]["output"] + "<|im_end|>\n" and "say 0" in other
    assert which["first"]["trained"] == len(rows[0]["output"]) + 2
    assert not (home / "cache").exists() or not list(cache_root().glob("*"))


def test_data_outside_of_the_folders_are_not_shown(home: Path) -> None:
    (home / "chosen").mkdir()
    info = {"talks": {"file_name": str(home / "talks.json")}}
    (home / "chosen" / "dataset_info.json").write_text(json.dumps(info))
    cfg = load_config(words(home, dataset_dir=home / "chosen"))
    with pytest.raises(UserError, match=r"dataset talks: .* lies outside"):
        preview(cfg, Folders([home / "chosen"]))


@pytest.mark.usefixtures("as_a_command")
def test_the_process(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "run.yaml"
    run.write_text("".join(w.replace("=", ": ", 1) + "\n" for w in words(home, packing="true")))
    assert previews.main([str(run), str(home)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any(len(sample["documents"]) > 1 for sample in found["samples"]), "rows are packed"
    run.write_text(run.read_text().replace("dataset: talks", "dataset: talk"))
    assert previews.main([str(run), str(home)]) == 2
    assert "talk" in capsys.readouterr().err


def test_head_and_tail_of_a_long_document() -> None:
    n = previews.CHARACTERS
    parts = (Part("p" * 10, False), Part("a" * (3 * n), True), Part("e", False))
    shown = list(previews._shortened(DecodedDocument("text", parts)))
    assert [part["trained"] for part in shown] == [False, True, None, True, False]
    assert shown[1]["text"] == "a" * (n - 10) and shown[3]["text"] == "a" * (n - 1)
    assert f"{n + 11} characters" in shown[2]["text"]
    short = (Part("abc", False), Part("def", True))
    assert [p["text"] for p in previews._shortened(DecodedDocument("text", short))] == [
        "abc",
        "def",
    ]
