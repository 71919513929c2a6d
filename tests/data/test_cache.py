"""What reuses the token cache, and what does not; workers that build it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from loaded_data import ALPACA, flat, load, texts
from longfactory.data import prepare


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the tokenising function got."""
    seen: list[int] = []
    original = prepare.Preparer.chunk

    def chunk(self: Any, rows: Any) -> Any:
        seen.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(prepare.Preparer, "chunk", chunk)
    return seen


def test_what_reuses_the_cache_and_what_does_not(
    tokenizer: Any, write_data: Any, tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_data(d=({}, ALPACA))
    load(tokenizer, folder, dataset="d")
    assert sum(tokenised) == 40
    monkeypatch.setenv("WORLD_SIZE", "8")
    same: list[dict[str, Any]] = [
        *(
            {"seed": 9},
            {"cutoff_len": 30},
            {"packing": True},
            {"mask_history": True},
            {"train_on_prompt": True},
            {"val_size": 0.5},
        ),
        *(
            {"preprocessing_num_workers": 2, "preprocessing_batch_size": 7},
            {"cutoff_strategy": "drop"},
            {"on_bad_row": "error"},
        ),
    ]
    for options in same:
        load(tokenizer, folder, dataset="d", **options)
    assert sum(tokenised) == 40, "tokenised again although nothing that matters changed"
    (folder / "copy.json").write_bytes((folder / "d.json").read_bytes())
    (folder / "dataset_info.json").write_text(
        json.dumps({"d": {"file_name": "d.json"}, "c": {"file_name": "d.json"}})
    )
    load(tokenizer, folder, dataset="c")
    assert sum(tokenised) == 40, "the content is the same under another name"
    for options in (
        {"template": "vicuna"},
        {"default_system": "Other."},
        {"max_samples": 40},
        {"overwrite_cache": True},
    ):
        before = sum(tokenised)
        load(tokenizer, folder, dataset="d", **options)
        assert sum(tokenised) == before + 40, options
    before = sum(tokenised)
    tokenizer.split_special_tokens = True
    load(tokenizer, folder, dataset="d")
    assert sum(tokenised) == before + 40, "special tokens in a text are other tokens"
    tokenizer.split_special_tokens = False
    (folder / "d.json").write_text(json.dumps(ALPACA[::-1]))
    before = sum(tokenised)
    assert "Question 39" in texts(load(tokenizer, folder, dataset="d").train, tokenizer)[0]
    assert sum(tokenised) == before + 40


@pytest.mark.processes
def test_workers_give_the_same_store(tokenizer: Any, write_data: Any, cache: Path) -> None:
    folder = write_data(d=({"file_name": "d.jsonl"}, ALPACA))
    one = flat(load(tokenizer, folder, dataset="d").train)
    three = flat(
        load(
            tokenizer,
            folder,
            dataset="d",
            overwrite_cache=True,
            preprocessing_num_workers=3,
            preprocessing_batch_size=4,
        ).train
    )
    assert one == three
    assert not [p for p in (cache / "tokens").iterdir() if p.name.startswith(".") and p.is_dir()]


def test_the_data_set_goes_to_workers_by_its_path(tokenizer: Any, write_data: Any) -> None:
    data = load(tokenizer, write_data(d=({}, ALPACA)), dataset="d").train
    sent = pickle.dumps(data)
    assert len(sent) < 20_000
    assert flat(pickle.loads(sent)) == flat(data)
