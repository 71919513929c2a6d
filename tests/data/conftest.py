"""Small tokenizers and data sets on disk for the tests of the data layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from small_tokenizers import byte_level, metaspace


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {"byte": byte_level(), "meta": metaspace()}


@pytest.fixture
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of one's own."""
    return copy.deepcopy(tokenizers["byte"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("LONGFACTORY_CACHE", str(path))
    return path


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a dataset_info.json and its files: name=(entry, rows or bytes)."""

    def write(**sets: tuple[dict[str, Any], Any]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        info = {}
        for name, (entry, rows) in sets.items():
            entry = {"file_name": f"{name}.json"} | entry
            info[name] = entry
            path = folder / entry["file_name"]
            if isinstance(rows, bytes):
                path.write_bytes(rows)
            elif path.suffix == ".jsonl":
                path.write_text(
                    "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
                    encoding="utf-8",
                )
            elif rows is not None:
                path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        return folder

    return write
