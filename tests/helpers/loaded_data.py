"""Data sets of a run, loaded from small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_arguments import make_args
from longfactory.data import module
from longfactory.data.module import load_datasets
from longfactory.data.row import IGNORE
from longfactory.data.templates import get_template

ALPACA = [
    {
        "instruction": f"Question {i}?",
        "input": "" if i % 3 else f"note {i}",
        "output": f"Answer {i}. " * (i % 7 + 1),
    }
    for i in range(40)
]


def load(
    tokenizer: Any, folder: Path, stage: str = "sft", seed: int = 0, **options: Any
) -> module.Datasets:
    args = make_args(dataset_dir=str(folder), **({"template": "chatml"} | options))
    template = get_template(args, tokenizer)
    return load_datasets(args, stage=stage, tokenizer=tokenizer, template=template, seed=seed)


def texts(data: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(d.input_ids) for i in range(len(data)) for d in data[i]]


def answers(data: Any, tokenizer: Any) -> list[str]:
    return [
        tokenizer.decode([t for t in d.labels if t != IGNORE])
        for i in range(len(data))
        for d in data[i]
    ]


def flat(data: Any) -> list[list[tuple[list[int], list[int], str]]]:
    return [
        [(list(d.input_ids), list(d.labels), d.role) for d in data[i]] for i in range(len(data))
    ]
