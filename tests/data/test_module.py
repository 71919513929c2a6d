"""Data sets of a run from end to end: mixing, splitting, cutting, packing."""

from __future__ import annotations

import logging
import re
from typing import Any

import datasets
import numpy as np
import pytest

from loaded_data import ALPACA, flat, load, texts
from longfactory.data.module import collate
from longfactory.errors import DataError

# -- mixing, splitting -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", ["concat", "interleave_under", "interleave_over", "interleave_once"]
)
@pytest.mark.parametrize("probs", [None, "0.7,0.3"])
def test_mixing_has_the_order_of_datasets(
    strategy: str, probs: str | None, tokenizer: Any, write_data: Any
) -> None:
    """The order that `datasets` gives raw rows, as LLaMA-Factory has it."""
    a = [{"instruction": f"a{i}", "input": "", "output": "x"} for i in range(12)]
    b = [{"instruction": f"b{i}", "input": "", "output": "x"} for i in range(5)]
    folder = write_data(a=({}, a), b=({}, b))
    if strategy == "concat":
        if probs:
            return
        expected = datasets.concatenate_datasets(
            [datasets.Dataset.from_list(a), datasets.Dataset.from_list(b)]
        )
    else:
        stop = {
            "under": "first_exhausted",
            "over": "all_exhausted",
            "once": "all_exhausted_without_replacement",
        }[strategy[11:]]
        chances = [0.7, 0.3] if probs else None
        expected = datasets.interleave_datasets(
            [datasets.Dataset.from_list(a), datasets.Dataset.from_list(b)],
            probabilities=chances,
            seed=3,
            stopping_strategy=stop,
        )
    data = load(
        tokenizer,
        folder,
        seed=3,
        dataset="a, b",
        mix_strategy=strategy,
        interleave_probs=probs,
        template="empty",
    ).train
    assert texts(data, tokenizer) == [r["instruction"] + "x" for r in expected]


def test_val_size_max_samples_and_eval_sets(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(
        d=({}, ALPACA),
        e=({}, ALPACA[:6]),
        n=({"num_samples": 7}, ALPACA),
        m=({"num_samples": 90}, ALPACA),
    )
    whole = texts(load(tokenizer, folder, dataset="d").train, tokenizer)
    for size, expected in ((0.25, 10), (4, 4)):
        found = load(tokenizer, folder, seed=5, dataset="d", val_size=size)
        held_out = texts(found.eval["eval"], tokenizer)
        split = datasets.Dataset.from_dict({"t": whole}).train_test_split(
            test_size=size if size < 1 else int(size), seed=5
        )
        assert (
            texts(found.train, tokenizer) == split["train"]["t"][:]
            and held_out == split["test"]["t"][:]
            and len(held_out) == expected
        )
    assert texts(load(tokenizer, folder, dataset="d", max_samples=3).train, tokenizer) == whole[:3]
    both = load(tokenizer, folder, dataset="d", eval_dataset=["d", "e"], max_samples=5)
    assert (len(both.train), len(both.eval["eval"])) == (5, 10)
    each = load(tokenizer, folder, dataset="d", eval_dataset="d,e", eval_on_each_dataset=True)
    assert {k: len(v) for k, v in each.eval.items()} == {"d": 40, "e": 6}
    assert len(set(texts(load(tokenizer, folder, dataset="n").train, tokenizer))) == 7
    assert len(load(tokenizer, folder, dataset="m").train) == 90
    assert load(tokenizer, folder, eval_dataset="e").train is None
    with pytest.raises(DataError, match="exclude each other"):
        load(tokenizer, folder, dataset="d", eval_dataset="e", val_size=0.1)
    for size in (40, 0.999):
        with pytest.raises(DataError, match=f"val_size {size} leaves nothing"):
            load(tokenizer, folder, dataset="d", val_size=size)
    assert len(load(tokenizer, folder, dataset="d", val_size=1).eval["eval"]) == 1


# -- cutting, packing ------------------------------------------------------------------------------


def test_cutoff_strategies_report_what_they_lose(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_data(d=({}, ALPACA))
    full = load(tokenizer, folder, dataset="d").train
    cutoff = int(np.sort(full.lengths)[-5]) - 1
    over = full.lengths[full.lengths > cutoff]
    for strategy in ("llamafactory", "keep_tail"):
        data = load(
            tokenizer, folder, dataset="d", cutoff_len=cutoff, cutoff_strategy=strategy
        ).train
        assert data.report.truncated == len(over) >= 5 and data.report.lost_tokens == int(
            over.sum() - len(over) * cutoff
        )
        assert all(
            data.lengths[i] == sum(len(d.input_ids) for d in data[i]) <= cutoff
            for i in range(len(data))
        )
        told = next(m for m in reversed(caplog.messages) if "longer than cutoff_len" in m)
        assert f"set cutoff_len: {full.lengths.max()}" in told
        assert ("the question itself" in told) == (strategy == "llamafactory")
        assert ("cutoff_strategy: keep_tail" in told) == (strategy == "llamafactory")
    dropped = load(tokenizer, folder, dataset="d", cutoff_len=cutoff, cutoff_strategy="drop").train
    assert (
        dropped.report.dropped == len(over)
        and dropped.report.lost_tokens == over.sum()
        and len(dropped) == 40 - len(over)
    )
    assert sorted(dropped.lengths) == sorted(full.lengths[full.lengths <= cutoff])
    with pytest.raises(
        DataError, match=rf"{len(over)} samples are longer than cutoff_len \({cutoff}\), first row"
    ):
        load(tokenizer, folder, dataset="d", cutoff_len=cutoff, cutoff_strategy="error")


@pytest.mark.processes
def test_packed_rows_hold_every_sample_once(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, ALPACA))
    alone = flat(load(tokenizer, folder, dataset="d").train)
    options: list[dict[str, Any]] = [
        {"packing": True},
        {"packing": True, "preprocessing_batch_size": 3},
        {"packing": True, "preprocessing_num_workers": 2, "overwrite_cache": True},
        {"neat_packing": True},
    ]
    packed = [load(tokenizer, folder, dataset="d", cutoff_len=200, **o).train for o in options]
    assert all(flat(p) == flat(packed[0]) for p in packed)
    documents = [d for row in flat(packed[0]) for d in row]
    assert sorted(documents) == sorted(d for s in alone for d in s)
    assert (
        packed[0].report.efficiency
        == pytest.approx(packed[0].lengths.sum() / (200 * len(packed[0])))
        and packed[0].report.efficiency > 0.8
    )
    row = collate([packed[0][0]], 16, 0)
    assert len({d.sample for d in row.documents if d.role != "pad"}) == len(packed[0][0]) > 1


def test_pretraining_splits_long_texts_and_loses_nothing(tokenizer: Any, write_data: Any) -> None:
    rows = [{"text": "word " * n} for n in (5, 300, 1, 77, 64)]
    folder = write_data(d=({"columns": {"prompt": "text"}}, rows))
    uncut = load(tokenizer, folder, "pt", dataset="d", packing=False, cutoff_len=10**6).train
    whole = [list(uncut[i][0].input_ids) for i in range(5)]
    # packing: null packs in pt
    packed = load(tokenizer, folder, "pt", dataset="d", cutoff_len=50).train
    pieces = sorted((d.sample, list(d.input_ids)) for i in range(len(packed)) for d in packed[i])
    assert all(len(p) <= 50 for _, p in pieces)
    assert [t for _, p in pieces for t in p] == [t for ids in whole for t in ids]
    assert packed.report.truncated == 0 and packed.report.tokens == sum(map(len, whole))


@pytest.mark.parametrize(("stage", "name"), [("dpo", "p"), ("sft", "d")])
def test_the_cutoff_len_that_is_named_keeps_all_and_one_less_does_not(
    stage: str, name: str, tokenizer: Any, write_data: Any
) -> None:
    pairs = [
        {"q": f"Question {i}? " * i, "good": "Yes. " * i, "bad": "No. " * (9 - i)} for i in range(9)
    ]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    folder = write_data(d=({}, ALPACA), p=({"ranking": True, "columns": columns}, pairs))
    cut = load(tokenizer, folder, stage=stage, dataset=name, cutoff_len=16).train
    keeps_all = cut.longest_uncut()
    for length, lost in ((keeps_all, False), (keeps_all - 1, True)):
        found = load(tokenizer, folder, stage=stage, dataset=name, cutoff_len=length).train
        assert (found.report.lost_tokens > 0) == lost
        documents = [len(d.input_ids) for i in range(len(found)) for d in found[i]]
        assert found.longest_document() == max(documents)
    keys = {"pref_share_prompt": True} if stage == "dpo" else {}
    shared = load(tokenizer, folder, stage=stage, dataset=name, cutoff_len=length, **keys).train
    assert shared.longest_document() == max(documents), "a branch goes on from its prompt"


def test_the_first_sample_is_shown(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = load(tokenizer, write_data(d=({}, ALPACA)), dataset="d").train
    (shown,) = (m for m in caplog.messages if m.startswith("Training example: "))
    trained = sum(label != -100 for label in data[0][0].labels)
    assert shown.startswith(f"Training example: {trained} of {data.lengths[0]} tokens are trained")
    assert re.search(r"Question 0\?.*\[\[", shown, re.DOTALL) and "input_ids" not in shown


@pytest.mark.parametrize("cutoff", [2048, 60, 12, 3, 1])
@pytest.mark.parametrize("template", ["chatml", "qwen3", "glm4"])
def test_lengths_of_pairs_and_kto_are_those_of_their_documents(
    cutoff: int, template: str, tokenizer: Any, write_data: Any
) -> None:
    rows = [
        {
            "q": "word " * (i % 9),
            "good": ("<think>\nx\n</think>\n\n" if i % 2 else "") + "good " * (i % 5 + 1),
            "bad": "bad " * (i % 7 + 1),
        }
        for i in range(20)
    ]
    kto_rows = [{"q": r["q"], "a": r["good"], "t": i % 3 == 0} for i, r in enumerate(rows)]
    folder = write_data(
        p=(
            {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            rows,
        ),
        k=({"columns": {"prompt": "q", "response": "a", "kto_tag": "t"}}, kto_rows),
    )
    for stage, name, options in (
        ("dpo", "p", {}),
        ("dpo", "p", {"pref_share_prompt": True}),
        ("kto", "k", {}),
    ):
        for thinking in (True, False, None):
            data = load(
                tokenizer,
                folder,
                stage,
                dataset=name,
                template=template,
                cutoff_len=cutoff,
                enable_thinking=thinking,
                **options,
            ).train
            assert data.lengths.tolist() == [
                sum(len(d.input_ids) for d in data[i]) for i in range(len(data))
            ]
            assert (
                all(len(d.input_ids) <= cutoff for i in range(len(data)) for d in data[i])
                or options
            )
