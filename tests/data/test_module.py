"""Data sets of a run from end to end: formats, sources, mixing, splitting, packing, cache, workers."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_arguments import make_args
from longfactory.data import module, prepare
from longfactory.data.module import collate, load_datasets
from longfactory.data.row import IGNORE
from longfactory.data.templates import get_template
from longfactory.errors import DataError

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


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_file_types_give_the_same_samples(ending: str, tokenizer: Any, write_data: Any) -> None:
    folder = write_data(
        j=({}, ALPACA), d=({"file_name": f"d.{ending}"}, ALPACA if ending == "jsonl" else None)
    )
    table = pa.Table.from_pylist(ALPACA)
    if ending == "json":
        (folder / "d.json").write_text(json.dumps(ALPACA, indent=2))
    elif ending == "csv":
        table.to_pandas().to_csv(folder / "d.csv", index=False)
    elif ending == "parquet":
        pq.write_table(table, folder / "d.parquet")
    elif ending == "arrow":
        with pa.ipc.new_stream(str(folder / "d.arrow"), table.schema) as writer:
            writer.write_table(table)
    expected = load(tokenizer, folder, dataset="j").train
    found = load(tokenizer, folder, dataset="d").train
    assert flat(found) == flat(expected) and len(found) == 40


def test_text_files_folders_and_hub_data_sets(
    tokenizer: Any, write_data: Any, tmp_path: Path
) -> None:
    columns = {"columns": {"prompt": "text"}}
    folder = write_data(
        t=({"file_name": "t.txt", **columns}, "Eins\r\nZwei Grüße\n\n\nDrei".encode()),
        many=({"file_name": "many", **columns}, None),
        hub=({"hf_hub_url": str(tmp_path / "hub"), **columns}, None),
    )
    (folder / "many").mkdir()
    for name, line in (("b.jsonl", "Zwei Grüße"), ("a.jsonl", "Eins")):
        (folder / "many" / name).write_text(json.dumps({"text": line}) + "\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "Eins"}\n{"text": "Drei"}\n')
    for name, expected in (
        ("t", ["Eins", "Zwei Grüße", "Drei"]),
        ("many", ["Eins", "Zwei Grüße"]),
        ("hub", ["Eins", "Drei"]),
    ):
        data = load(tokenizer, folder, "pt", dataset=name, packing=False).train
        assert texts(data, tokenizer) == [line + tokenizer.eos_token for line in expected]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (
            "hy_dense_1_8b",
            "S<｜hy_place▁holder▁no▁3｜><｜hy_User｜>Q<｜hy_Assistant｜>A<｜hy_User｜>R<｜hy_Assistant｜>B",
        ),
        ("hy_dense_7b", "S<|extra_4|>Q<|extra_0|>AR<|extra_0|>B"),
    ],
)
def test_templates_of_llamafactory_after_0_9_5(
    name: str, written: str, tokenizer: Any, write_data: Any
) -> None:
    """The wheel that others are compared with does not have them."""
    columns = {
        "prompt": "instruction",
        "response": "output",
        "system": "system",
        "history": "history",
    }
    row = {"instruction": "R", "output": "B", "system": "S", "history": [["Q", "A"]]}
    folder = write_data(d=({"columns": columns}, [row]))
    data = load(tokenizer, folder, template=name, dataset="d").train
    begin = tokenizer.bos_token or ""
    assert texts(data, tokenizer) == [begin + written + tokenizer.eos_token]


def test_missing_files_and_names(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(
        gone=({"file_name": "gone.json"}, None),
        mixed=({"file_name": "mixed"}, None),
        ms=({"ms_hub_url": "x/y"}, None),
        d=({}, ALPACA),
    )
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.json").write_text("[]")
    (folder / "mixed" / "b.csv").write_text("x\n")
    for name, message in {
        "gone": "gone.json does not exist",
        "mixed": "mixes file types",
        "ms": "ModelScope",
        "dd": "not in dataset_info.json. Did you mean 'd'",
    }.items():
        with pytest.raises(DataError, match=message):
            load(tokenizer, folder, dataset=name)
    with pytest.raises(DataError, match="No data set"):
        load(tokenizer, folder)
    with pytest.raises(DataError, match=r"dataset_info\.json does not exist"):
        load(tokenizer, folder / "mixed", dataset="d")


@pytest.mark.processes
@pytest.mark.parametrize("workers", [None, 2])
def test_what_cannot_be_fetched_is_told(
    tokenizer: Any, workers: int | None, write_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    from longfactory import hub

    monkeypatch.setattr(hub, "unreachable", lambda: None)

    def rows(*args: Any, **kwargs: Any) -> Any:
        yield ALPACA[0]
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(
        DataError,
        match=(
            r"'someone/data': someone/data could not be read from the Hugging Face hub after row 1"
            r" \(Couldn't"
        ),
    ):
        load(tokenizer, "ONLINE", dataset="someone/data", preprocessing_num_workers=workers)

    def download(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        DataError,
        match=r"dataset_dir: REMOTE:a/b: no dataset_info\.json could be read from the hub \(404\)",
    ):
        load(tokenizer, "REMOTE:a/b", dataset="d")
    folder = write_data(d=({}, ALPACA))
    info = {"c": {"cloud_file_name": "file://" + str(folder / "absent.json")}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"'c': file://.* could not be copied"):
        load(tokenizer, folder, dataset="c", preprocessing_num_workers=workers)


def test_a_dataset_info_of_another_shape(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, ALPACA))
    for info, expected in [
        ({"d": "d.json"}, "data set 'd' is not a mapping"),
        (
            {"d": {"file_name": "d.json", "columns": ["a"]}},
            "columns of data set 'd' is not a mapping",
        ),
        ([{"d": {}}], "holds a list; a mapping of names"),
    ]:
        (folder / "dataset_info.json").write_text(json.dumps(info))
        with pytest.raises(DataError, match=expected):
            load(tokenizer, folder, dataset="d")


def test_one_empty_data_set_among_several_is_an_error(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, ALPACA), none=({}, []), bad=({}, [{"instruction": "no answer"}]))
    with pytest.raises(DataError, match=r"'none' has no usable row\. There are no rows in it"):
        load(tokenizer, folder, dataset="d,none")
    with pytest.raises(
        DataError, match=r"'bad' has no usable row\. Of 1 rows 1 were bad\. First: bad"
    ):
        load(tokenizer, folder, dataset="d,bad")


# -- formats ---------------------------------------------------------------------------------------


def test_columns_and_tags(tokenizer: Any, write_data: Any) -> None:
    chat = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "sys": "Be kind.",
    }
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    with_system = {
        "messages": [{"role": "system", "content": "First."}, *chat["messages"]],
        "sys": "Second.",
    }
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "system": "sys"},
        "tags": tags,
    }
    alpaca = {
        "columns": {"prompt": "q", "query": "more", "response": "a", "system": "s", "history": "h"}
    }
    rows = [{"q": "Q", "more": "M", "a": "A", "s": "S", "h": [["old q", "old a"]]}]
    folder = write_data(
        c=(entry, [chat, with_system]),
        a=(alpaca, rows),
        o=({"formatting": "openai"}, [{"messages": chat["messages"]}]),
    )
    first, second = texts(load(tokenizer, folder, dataset="c").train, tokenizer)
    assert "system\nBe kind." in first and "system\nFirst." in second and "Second." not in second
    data = load(tokenizer, folder, dataset="a").train
    assert texts(data, tokenizer) == [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nold"
        " q<|im_end|>\n<|im_start|>assistant\nold"
        " a<|im_end|>\n<|im_start|>user\nQ\nM<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    ]
    assert answers(data, tokenizer) == ["old a<|im_end|>\nA<|im_end|>\n"]
    assert texts(load(tokenizer, folder, dataset="o").train, tokenizer)[0].startswith(
        "<|im_start|>user\nHi<|im_end|>"
    )


def test_naming_some_columns_unsets_the_others_and_says_so(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_data(d=({"columns": {"prompt": "instruction"}}, ALPACA))
    with pytest.raises(DataError, match=r"'d' has no usable row\. Of 40 rows 40 were bad"):
        load(tokenizer, folder, dataset="d")
    assert "columns names no response" in caplog.text


def test_a_data_set_of_another_stage_is_refused(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, ALPACA), p=({"ranking": True}, ALPACA))
    with pytest.raises(DataError, match="Stage dpo needs pairs"):
        load(tokenizer, folder, "dpo", dataset="d")
    with pytest.raises(DataError, match="Stage sft cannot use pairs"):
        load(tokenizer, folder, dataset="p")
    with pytest.raises(DataError, match="Stage kto needs the column kto_tag"):
        load(tokenizer, folder, "kto", dataset="d")


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


# -- cache -----------------------------------------------------------------------------------------


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


def test_the_data_sets_of_the_project_load(tokenizer: Any) -> None:
    folder = Path(__file__).parents[2] / "data"
    for stage, name in (
        ("sft", "manual_sft"),
        ("sft", "manual_sft_eval"),
        ("pt", "manual_pt"),
        ("dpo", "manual_dpo"),
        ("kto", "manual_kto"),
    ):
        data = load(tokenizer, folder, stage, dataset=name, cutoff_len=65536).train
        assert data.report.bad == 0 and data.report.truncated == 0 and len(data) > 0


# -- questions for do_predict ----------------------------------------------------------------------


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"from": r, "value": f"{r} {i}"} for i, r in enumerate(roles)]


QUESTIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "alpaca": (
        {},
        [
            {"instruction": "Q", "output": "A"},
            {"instruction": "Q"},
            {"instruction": "Q", "output": ""},
        ],
    ),
    "sharegpt": (
        {"formatting": "sharegpt"},
        [
            {"conversations": c}
            for c in (
                chat("human", "gpt"),
                chat("human", "gpt", "human"),
                [*chat("human"), {"from": "gpt", "value": ""}],
            )
        ],
    ),
}


@pytest.mark.parametrize("template", ["chatml", "mistral", "qwen3", "deepseekr1"])
@pytest.mark.parametrize("form", list(QUESTIONS))
def test_questions_are_for_do_predict(
    form: str, template: str, tokenizer: Any, write_data: Any
) -> None:
    """A conversation without its last answer is the prompt that the same conversation with an
    answer has.
    """
    info, rows = QUESTIONS[form]
    folder = write_data(d=(info, rows), t=({}, ALPACA))
    for thinking in (True, False):
        options = {
            "dataset": None,
            "eval_dataset": "d",
            "template": template,
            "enable_thinking": thinking,
        }
        data = load(tokenizer, folder, do_predict=True, **options).eval["eval"]
        assert len(data) == 3 and data.report.unanswered == 2 and not data.report.bad_rows
        assert "2 samples have no answer and are for do_predict alone" in data.report.describe()
        (answered,), *questions = (data[i] for i in range(3))
        assert answered.role == "text"
        prompt = list(
            answered.input_ids[
                : next(i for i, label in enumerate(answered.labels) if label != IGNORE)
            ]
        )
        for (question,) in questions:
            assert question.role == "prompt" and set(question.labels) == {IGNORE}
        assert list(questions[1][0].input_ids) == prompt
        assert data.lengths.tolist() == [len(data[i][0].input_ids) for i in range(3)]
        if form == "alpaca":
            assert list(questions[0][0].input_ids) == prompt
        # an evaluation has no use for them
        assert len(load(tokenizer, folder, **options).eval["eval"]) == 1


def test_questions_alone_cannot_be_evaluated(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, [{"instruction": "Q"}]))
    options = {"dataset": None, "eval_dataset": "d"}
    assert len(load(tokenizer, folder, do_predict=True, **options).eval["eval"]) == 1
    with pytest.raises(
        DataError, match=r"None of the 1 evaluation samples has an answer.*Leave out do_eval"
    ):
        load(tokenizer, folder, do_predict=True, do_eval=True, **options)


def test_a_question_is_cut_as_a_prompt(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, [{"instruction": "long " * 50}]))
    data = load(
        tokenizer, folder, dataset=None, eval_dataset="d", do_predict=True, cutoff_len=40
    ).eval["eval"]
    assert len(data[0][0].input_ids) == 40 == data.lengths[0] and data.report.truncated == 1
