"""Data sets that the package datasets saved are read as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_arguments import make_args
from longfactory.data.module import load_datasets
from longfactory.errors import DataError

ROWS = [{"text": f"row {i}"} for i in range(7)]


def write_entries(folder: Path, **entries: dict[str, Any]) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries))


def texts(tokenizer: Any, folder: Path, name: str, **keys: Any) -> list[str]:
    options = make_args(dataset=name, dataset_dir=str(folder), packing=False, **keys)
    data = load_datasets(options, stage="pt", tokenizer=tokenizer, template=None, seed=0).train
    assert data is not None
    return [
        tokenizer.decode([t for document in sample for t in document.input_ids]).removesuffix(
            tokenizer.eos_token
        )
        for sample in data
    ]


def test_folders_of_save_to_disk(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    # rows in another order are written in that order
    split = {"train": rows, "test": rows.select([5, 1])}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "two")
    entry = {"columns": {"prompt": "text"}}
    write_entries(
        tmp_path,
        one={"file_name": "one", **entry},
        two={"file_name": "two", **entry},
        test={"file_name": "two", "split": "test", **entry},
        none={"file_name": "two", "split": "validation", **entry},
        empty={"file_name": "empty", **entry},
    )
    rows.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="empty holds no rows"):
        texts(tokenizer, tmp_path, "empty")
    every = [row["text"] for row in ROWS]
    assert texts(tokenizer, tmp_path, "one") == every
    assert texts(tokenizer, tmp_path, "two") == every
    assert texts(tokenizer, tmp_path, "test") == ["row 5", "row 1"]
    with pytest.raises(DataError, match=r"no split 'validation'. Set split to one of train, test"):
        texts(tokenizer, tmp_path, "none")
    next((tmp_path / "one").glob("*-00001-*")).unlink()
    with pytest.raises(DataError, match=r"lacks data-00001-of-00003.arrow"):
        texts(tokenizer, tmp_path, "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json is not what datasets' save_to_disk writes"):
        texts(tokenizer, tmp_path, "one")


def test_another_file_in_a_folder_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_entries(tmp_path, d={"file_name": "d", "columns": {"prompt": "text"}})
    (tmp_path / "d" / "README.md").write_text("what this is")
    with pytest.raises(DataError, match="holds no file of a known type"):
        texts(tokenizer, tmp_path, "d")
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"README.md is of no known type"):
        texts(tokenizer, tmp_path, "d")
    shutil.move(tmp_path / "d" / "README.md", tmp_path)
    assert texts(tokenizer, tmp_path, "d") == ["a"]
    (tmp_path / "d" / "state.json").write_text('[{"text": "b"}]')
    assert texts(tokenizer, tmp_path, "d") == ["a", "b"]
