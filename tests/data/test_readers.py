"""Files, folders and hub data sets: what is read, and what is told where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loaded_data import ALPACA, answers, flat, load, texts
from longfactory.errors import DataError


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
