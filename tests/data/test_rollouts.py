"""Rollouts: what files say becomes rows with numbers at the right tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longfactory.data.collate import collate
from longfactory.data.fingerprint import data_fingerprint
from longfactory.data.rollouts import RolloutDataset, load_rollouts
from longfactory.data.row import IGNORE
from longfactory.errors import DataError


class Tokens:
    """A tokenizer of 100 words, each a number."""

    bos_token_id = eos_token_id = None
    unk_token_id = 0

    def __len__(self) -> int:
        return 100

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) % 100 for c in text]


def load(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> RolloutDataset:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args: dict[str, Any] = {
        "dataset": (str(path),),
        "eval_dataset": (),
        "dataset_dir": str(tmp_path),
        "cutoff_len": 50,
        "cutoff_strategy": "llamafactory",
        "val_size": 0.0,
        "packing": None,
        "neat_packing": False,
        "on_bad_row": "skip",
        "rl_share_prompt": True,
    }
    found = load_rollouts(
        SimpleNamespace(**{**args, **keys}),  # type: ignore[arg-type]
        tokenizer=Tokens(),
        template=None,
        log=logging.getLogger("longfactory.tests"),
    )
    return found[0]


GROUP = [
    {
        "prompt_ids": [5, 6, 7],
        "completion_ids": [11, 12, 13],
        "completion_mask": [1, 0, 1],
        "advantage": 0.5,
        "logprobs": [-1.0, None, -3.0],
        "group": "a",
    },
    {
        "prompt_ids": [5, 6, 7],
        "completion_ids": [21, 22],
        "advantages": [0.25, -0.75],
        "logprobs": [-0.5, -0.25],
        "group": "a",
        "reward": 1.0,
    },
]


def test_a_group_shares_its_prompt(tmp_path: Path) -> None:
    data = load(tmp_path, GROUP)
    assert len(data) == 1 and list(data.lengths) == [2 + 4 + 3]
    row = collate([data[0]], 4, 0)
    assert len(row) == 12 and len(data[0]) == 3
    assert row.input_ids[:9].tolist() == [5, 6, 7, 11, 12, 13, 7, 21, 22]
    assert row.position_ids[:9].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    x = IGNORE
    assert row.labels.tolist() == [x, x, 11, x, 13, x, 21, 22, x, x, x, x]
    # numbers stand where their token is predicted
    assert row.numbers["advantage"].tolist() == [0, 0, 0.5, 0, 0.5, 0, 0.25, -0.75, 0, 0, 0, 0]
    assert row.numbers["old_logp"].tolist() == [0, 0, -1, 0, -3, 0, -0.5, -0.25, 0, 0, 0, 0]
    assert data.where(0)[1] == 0 and data.report.tokens == 9


def test_the_same_without_sharing(tmp_path: Path) -> None:
    """And in the other form: whole ids with a mask."""
    data = load(tmp_path, GROUP, rl_share_prompt=False)
    assert list(data.lengths) == [6, 5]
    whole = {
        "input_ids": [5, 6, 7, 11, 12, 13],
        "mask": [0, 0, 0, 1, 0, 1],
        "advantage": 0.5,
        "logprobs": [None, None, None, -1.0, None, -3.0],
    }
    other = load(tmp_path, [whole])
    a, b = collate([data[0]], 1, 0), collate([other[0]], 1, 0)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
    for name in ("advantage", "old_logp"):
        assert torch.equal(a.numbers[name], b.numbers[name])
    assert data_fingerprint(data) != data_fingerprint(load(tmp_path, GROUP))


def test_packed_rows_hold_whole_groups(tmp_path: Path) -> None:
    alone = {"prompt_ids": [1, 2], "completion_ids": [3] * 30, "advantage": 1.0, "group": 7}
    rows = [{**r, "logprobs": [-1.0] * len(r["completion_ids"])} for r in [*GROUP, alone]]
    data = load(tmp_path, rows, packing=True, cutoff_len=45)
    assert len(data) == 1 and list(data.lengths) == [9 + 32]
    row = collate([data[0]], 1, 0)
    assert sorted(d.parent for d in row.documents if d.parent >= 0)[0] in (0, 1)
    assert row.trained_tokens == 4 + 30


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"completion_ids": [11, 12, "x"]}, "completion_ids is not a list of token ids"),
        ({"completion_ids": [11, 12, 100]}, "a token id that the tokenizer does not have"),
        ({"completion_mask": [0, 0, 0]}, "no trained token"),
        ({"completion_mask": [1, 1]}, "completion_mask has another length"),
        ({"logprobs": [-1.0, None, None]}, "logprobs holds something else than a number"),
        ({"logprobs": [-1.0]}, "logprobs has another length"),
        ({"advantages": [1, 2, 3]}, "advantage and advantages"),
        ({"advantage": "high"}, "an advantage that is not a number"),
        ({"input_ids": [1, 2]}, "expected one of completion_ids"),
    ],
)
def test_a_bad_row_is_counted_or_ends_the_run(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    bad = {**GROUP[0], **change}
    with pytest.raises(DataError, match=reason):
        load(tmp_path, [bad], on_bad_row="error")
    with pytest.raises(DataError, match=f"1 rows were bad. First: .*{reason}"):
        load(tmp_path, [bad])


def test_rollouts_are_never_shortened(tmp_path: Path) -> None:
    data = load(tmp_path, GROUP, cutoff_len=5)
    assert len(data) == 1 and data.report.dropped == 1 and list(data.lengths) == [5]
    with pytest.raises(DataError, match="a rollout of 6 tokens is longer than cutoff_len"):
        load(tmp_path, GROUP, cutoff_len=5, cutoff_strategy="error")


def test_rows_have_the_same_columns(tmp_path: Path) -> None:
    rows = [GROUP[0], {k: v for k, v in GROUP[1].items() if k != "logprobs"}]
    with pytest.raises(DataError, match="Some rollouts have logprobs and others have not"):
        load(tmp_path, rows)


def test_some_groups_are_held_out(tmp_path: Path) -> None:
    rows = [{**GROUP[0], "group": i} for i in range(5)]
    path = tmp_path / "rollouts.jsonl"
    data = load(tmp_path, rows, val_size=2.0)
    assert len(data) == 3 and path.is_file()
    assert np.array_equal(data.lengths, [6, 6, 6])
