"""`--dry_run` names everything on this machine that would stop the run, and what it could not look
at.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher import without_launcher
from longfactory import cli
from small_runs import write_model

pytestmark = pytest.mark.usefixtures("as_a_command")

ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "m",
    "r": 4,
    "target_modules": ["q_proj"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dry")
    write_model(home / "model", 0)
    (home / "adapter").mkdir()
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"a": torch.ones(1)}, home / "adapter" / "adapter_model.safetensors")
    rows = [{"instruction": "a", "output": "b"}] * 3
    (home / "talks.json").write_text(json.dumps(rows))
    (home / "half.json").write_text(json.dumps([*rows, {"instruction": "a", "output": None}]))
    (home / "odd.json").write_text(json.dumps([{"role": "user"}] * 3))
    (home / "broken.jsonl").write_text('{"instruction": "a"\n')
    (home / "pairs.json").write_text(
        json.dumps([{"instruction": "a", "chosen": "b", "rejected": "c"}])
    )
    names = {
        name: {"file_name": f"{name}.json"} for name in ("talks", "half", "odd", "absent_file")
    }
    names |= {"broken": {"file_name": "broken.jsonl"}, "far": {"hf_hub_url": "someone/rows"}}
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    names |= {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (home / "dataset_info.json").write_text(json.dumps(names))
    return home


@pytest.fixture(autouse=True)
def _clean(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_launcher(monkeypatch)
    monkeypatch.setenv("LONGFACTORY_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)


def dry(capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str, str]:
    keys = {
        "model_name_or_path": "model",
        "dataset": "talks",
        "dataset_dir": ".",
        "template": "chatml",
        "output_dir": "out",
    } | changes
    status = cli.main(
        ["train", *(f"{k}={v}" for k, v in keys.items() if v is not None), "--dry_run"]
    )
    out, err = capsys.readouterr()
    return status, out, err


def test_a_run_that_has_all_it_needs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = dry(capsys, adapter_name_or_path="adapter", eval_dataset="talks")
    assert status == 0 and "model_name_or_path: model" in out
    assert (
        err == "not checked: Rows beyond the first 20 of each data set; they are read when the run"
        " starts.\n"
    )
    assert not (home / "out").exists() and not (home / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": "./absent"}, "the folder ./absent does not exist"),
        ({"model_name_or_path": "talks.json"}, "talks.json is a file; a folder is needed"),
        ({"model_name_or_path": "adapter"}, "holds an adapter, not a model"),
        (
            {"ref_model": "./absent", "stage": "dpo", "dataset": "pairs"},
            "ref_model: the folder ./absent does not exist",
        ),
        (
            {"adapter_name_or_path": "model"},
            "adapter_name_or_path: model holds no adapter_config.json",
        ),
        (
            {"adapter_name_or_path": "./absent"},
            "adapter_name_or_path: the folder ./absent does not exist",
        ),
        ({"template": "chatmll"}, "Template 'chatmll' is not known. Did you mean chatml"),
        (
            {"template": "chatmll", "model_name_or_path": "someone/model"},
            "Template 'chatmll' is not known",
        ),
        ({"dataset": "talk"}, "Data set 'talk' is not in dataset_info.json. Did you mean 'talks'?"),
        ({"dataset": "absent_file"}, "absent_file.json does not exist"),
        ({"eval_dataset": "talk"}, "Data set 'talk' is not in dataset_info.json"),
        ({"dataset_dir": "nowhere"}, "nowhere/dataset_info.json does not exist"),
        ({"dataset": "odd"}, "Data set 'odd': none of its first 3 rows can be used"),
        (
            {"dataset": "broken"},
            (
                "Data set 'broken': none of its first 1 rows can be used. First: broken.jsonl:1:"
                " invalid JSON"
            ),
        ),
        (
            {"dataset": "broken", "model_name_or_path": "someone/model"},
            "Data set 'broken', broken.jsonl:1: invalid JSON",
        ),
        ({"dataset": "half", "on_bad_row": "error"}, "Repair it, or set on_bad_row: skip"),
        ({"dataset": "pairs"}, "cannot use pairs"),
        ({"deepspeed": "absent.json"}, "deepspeed: there is no file absent.json"),
        ({"resume_from_checkpoint": "absent"}, "resume_from_checkpoint: there is no folder absent"),
        ({"output_dir": "talks.json/out"}, "out cannot be made: "),
        ({"tokenized_path": "talks.json"}, "tokenized_path: talks.json cannot be made"),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_what_is_not_there_is_told(
    changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = dry(capsys, **changes)
    assert (status, out) == (2, "") and words in err


def test_everything_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = dry(
        capsys,
        template="chatmll",
        dataset="talk,absent_file",
        eval_dataset="odder",
        adapter_name_or_path="./absent",
    )
    for words in ("./absent", "chatmll", "'talk'", "absent_file.json", "'odder'"):
        assert words in err


def test_weights_that_are_not_all_there(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "model", folder)
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    assert "holds no weights" in dry(capsys, model_name_or_path=folder)[2]
    assert (
        dry(capsys, model_name_or_path=folder, train_from_scratch=True, finetuning_type="full")[0]
        == 0
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}})
    )
    assert (
        "lacks part-2.safetensors, which model.safetensors.index.json names"
        in dry(capsys, model_name_or_path=folder)[2]
    )
    (folder / "part-2.safetensors").write_bytes(b"")
    assert "is cut short or no safetensors file" in dry(capsys, model_name_or_path=folder)[2]
    shutil.copy(folder / "part-1.safetensors", folder / "part-2.safetensors")
    assert dry(capsys, model_name_or_path=folder)[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "No tokenizer could be loaded" in dry(capsys, model_name_or_path=folder)[2]


def test_what_could_not_be_looked_at_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = dry(capsys, model_name_or_path="someone/model", dataset="far,talks")
    assert status == 0
    assert (
        "not checked: model_name_or_path: there is no folder someone/model; whether the hub has"
        in err
    )
    assert "not checked: Data set 'far' is on the hub (someone/rows)" in err
    assert "not checked: Tokenisation of the first rows" in err
    status, _, err = dry(capsys, dataset="half")
    assert status == 0 and "note: Data set 'half', first 4 rows: 1 bad rows" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folders_that_may_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert "there is no permission to write into" in dry(capsys, output_dir=tmp_path / "out")[2]
