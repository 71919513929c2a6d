"""template_compat 0.9.1 gives the tokens of LLaMA-Factory 0.9.1, the base of 360-LLaMA-Factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_golden_0_9_1 import CASES, NAMES, characters

from data_arguments import make_args
from longfactory.data.module import load_datasets
from longfactory.data.templates import get_template

GOLDEN = json.loads(Path(__file__).with_name("golden_0_9_1.json").read_text())
ROLES = {
    "user": "human",
    "assistant": "gpt",
    "function": "function_call",
    "observation": "observation",
}


@pytest.mark.parametrize("name", NAMES)
def test_tokens(name: str, write_data: Any) -> None:
    differs = 0
    for golden in [g for g in GOLDEN if g["template"] == name]:
        case = CASES[golden["case"]]
        row = {
            "conversations": [{"from": ROLES[r], "value": c} for r, c in case["messages"]],
            "system": case.get("system", ""),
        }
        info = {
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system"},
        }
        folder = str(write_data(d=(info, [row])))
        found = {}
        for compat in ("0.9.1", "0.9.5"):
            tokenizer = characters()
            options = {k: case[k] for k in ("cutoff_len", "mask_history") if k in case}
            args = make_args(
                dataset="d", dataset_dir=folder, template=name, template_compat=compat, **options
            )
            template = get_template(args, tokenizer)
            (document,) = load_datasets(
                args, stage="sft", tokenizer=tokenizer, template=template, seed=0
            ).train[0]
            found[compat] = (list(document.input_ids), list(document.labels))
        assert found["0.9.1"] == (golden["ids"], golden["labels"]), golden["case"]
        differs += found["0.9.1"] != found["0.9.5"]
    assert differs or name in (
        "vicuna",
        "zephyr",
        "deepseek",
        "llama2",
        "llama2_zh",
        "openchat",
        "solar",
    )
