"""Data sets by name and by path: what dataset_info.json says, what a file says by itself, and what
is wrong with either.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_arguments import make_args
from longfactory.config.data_names import short_names
from longfactory.data.module import load_datasets
from longfactory.data.sources import detect, read_sources
from longfactory.data.templates import get_template
from longfactory.errors import DataError

OPENAI = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
USERS = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}
TAGS |= {"function_tag": "function", "system_tag": "system"}


def load(tokenizer: Any, folder: Any, stage: str = "sft", **options: Any) -> Any:
    args = make_args(dataset_dir=str(folder), **({"template": "chatml", "dataset": "d"} | options))
    return load_datasets(
        args, stage=stage, tokenizer=tokenizer, template=get_template(args, tokenizer), seed=0
    ).train


# -- a file by its path ----------------------------------------------------------------------------

FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        "sft",
        {"instruction": "Q", "input": "", "output": "A", "id": 7},
        {"columns": {"prompt": "instruction", "response": "output"}},
    ),
    "alpaca of others": (
        "sft",
        {"question": "Q", "answer": "A"},
        {"columns": {"prompt": "question", "response": "answer"}},
    ),
    "openai": (
        "sft",
        {"messages": OPENAI},
        {"formatting": "openai", "columns": {"messages": "messages"}, "tags": TAGS},
    ),
    "openai with tools": (
        "sft",
        {"conversations": OPENAI, "tools": [{"name": "f", "parameters": {}}]},
        {
            "formatting": "openai",
            "columns": {"messages": "conversations", "tools": "tools"},
            "tags": TAGS,
        },
    ),
    "sharegpt": (
        "sft",
        {"conversations": SHAREGPT, "system": "S"},
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
    ),
    "preference": (
        "dpo",
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    "preference of messages": (
        "dpo",
        {
            "conversations": SHAREGPT[:1],
            "chosen": SHAREGPT[1],
            "rejected": {"from": "gpt", "value": "B"},
        },
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    "kto": (
        "kto",
        {"messages": OPENAI, "label": True},
        {
            "formatting": "openai",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": TAGS,
        },
    ),
    "text": ("pt", {"text": "a text"}, {"columns": {"prompt": "text"}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_by_its_path(
    form: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its form is that of its rows; the entry that is printed gives the same tokens."""
    stage, row, expected = FORMS[form]
    assert detect([row]) == expected
    path = tmp_path / "some rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 2)
    found = load(tokenizer, tmp_path / "nothing here", stage, dataset=str(path), packing=False)
    told = next(m for m in caplog.messages if "judging by its first rows" in m)
    entry = json.loads("{" + told.split("dataset_info.json: ", 1)[1] + "}")
    assert entry == {"some rows": {"file_name": str(path)} | expected}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    named = load(tokenizer, tmp_path, stage, dataset="some rows", packing=False)
    for data in (found, named):
        assert len(data) == 2 and data.report.bad == 0
    assert all(
        (a.input_ids == b.input_ids).all() and (a.labels == b.labels).all()
        for a, b in zip(found[0], named[0], strict=True)
    )


def test_paths_beside_names_and_from_dataset_dir(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, [{"instruction": "Q", "output": "A"}]))
    (folder / "more").mkdir()
    (folder / "more" / "rows.jsonl").write_text(json.dumps({"conversations": USERS}) + "\n")
    for path in ("more/rows.jsonl", "more/", str(folder / "more/rows.jsonl")):
        assert len(load(tokenizer, folder, dataset=f"d,{path}")) == 2
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    pq.write_table(pa.table({c: ["x"] for c in columns.values()}), folder / "rows.parquet")
    assert len(load(tokenizer, folder, dataset="rows.parquet")) == 1
    (folder / "rows.csv").write_text('messages\n"' + json.dumps(OPENAI).replace('"', '""') + '"\n')
    assert len(load(tokenizer, folder, dataset="rows.csv", streaming=False)) == 1


def test_names_of_evaluation_metrics_have_no_path(write_data: Any) -> None:
    assert short_names(["d", "a/x.jsonl", "y.csv"]) == ["d", "x", "y"]
    assert short_names(["x", "a/x.jsonl", "b/x.jsonl"]) == ["x", "a_x.jsonl", "b_x.jsonl"]


def test_paths_that_cannot_be_used(tokenizer: Any, write_data: Any, tmp_path: Path) -> None:
    folder = write_data(d=({}, [{"instruction": "Q", "output": "A"}]))
    (folder / "odd.jsonl").write_text(json.dumps({"a": 1, "b": "x"}) + "\n")
    (folder / "broken.jsonl").write_text("{\n")
    for name, message in (
        (
            "odd.jsonl",
            r"format of odd.jsonl cannot be inferred from its first rows \(columns: 'a', 'b'\)",
        ),
        (
            "broken.jsonl",
            r"broken.jsonl holds no row that can be read. First: broken.jsonl:1: invalid JSON",
        ),
        ("missing.jsonl", "'missing.jsonl' is not in dataset_info.json and is no file"),
        ("dd", r"'dd' is not in dataset_info.json. Did you mean 'd'\?"),
    ):
        with pytest.raises(DataError, match=message):
            load(tokenizer, folder, dataset=name)
    with pytest.raises(
        DataError,
        match=(
            r"dataset_info\.json does not exist, and 'x/rows\.jsonl' is no file\. Point dataset_dir"
        ),
    ):
        load(tokenizer, tmp_path / "none", dataset="x/rows.jsonl")


# -- rows in another form than their entry says ----------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "row", "lines"),
    [
        (
            {},
            {"messages": OPENAI},
            (
                '"formatting": "openai", "columns": {"messages": "messages"}, "tags": {"role_tag":'
                ' "role"'
            ),
        ),
        (
            {},
            {"conversations": SHAREGPT},
            '"formatting": "sharegpt", "columns": {"messages": "conversations"}',
        ),
        (
            {"formatting": "sharegpt"},
            {"conversations": OPENAI},
            '"formatting": "openai", "columns": {"messages": "conversations"}',
        ),
        (
            {"formatting": "sharegpt"},
            {"instruction": "Q", "output": "A"},
            '"columns": {"prompt": "instruction", "response": "output"}',
        ),
        (
            {"columns": {"messages": "messages"}},
            {"messages": OPENAI},
            '"formatting": "openai", "columns": {"messages": "messages"}',
        ),
        (
            {},
            {"question": "Q", "answer": "A"},
            '"columns": {"prompt": "question", "response": "answer"}',
        ),
    ],
)
def test_the_lines_that_are_missing_are_told(
    entry: dict, row: dict, lines: str, tokenizer: Any, write_data: Any
) -> None:
    folder = write_data(d=(entry, [row] * 3))
    with pytest.raises(DataError) as error:
        load(tokenizer, folder)
    text = str(error.value)
    assert (
        text.count(lines) == 1
        and "None" not in text
        and "give the data set these lines in dataset_info.json: " in text
    )
    told = json.loads("{" + text.split("these lines in dataset_info.json: ", 1)[1] + "}")
    assert len(load(tokenizer, write_data(d=(told, [row] * 3)))) == 3
    with pytest.raises(DataError, match=r"on_bad_row: skip\. The row looks like"):
        load(tokenizer, write_data(d=(entry, [row] * 3)), on_bad_row="error")


def test_a_column_that_is_not_named_is_no_column_named_none(
    tokenizer: Any, write_data: Any
) -> None:
    cases = [
        ({"columns": {"response": "output"}}, {"instruction": "Q", "output": "A"}, "sft", "prompt"),
        (
            {"formatting": "sharegpt", "columns": {"system": "s"}},
            {"chat": SHAREGPT, "s": ""},
            "sft",
            "messages",
        ),
        (
            {"ranking": True, "columns": {"prompt": "q"}},
            {"q": "Q", "good": "A"},
            "dpo",
            "chosen and rejected",
        ),
    ]
    for entry, row, stage, key in cases:
        with pytest.raises(
            DataError,
            match=(
                f"dataset_info.json does not say which column holds the {key}; the row's columns"
                " are '"
            ),
        ):
            load(tokenizer, write_data(d=(entry, [row])), stage)
    with pytest.raises(
        DataError,
        match=r"missing column: 'q' is not among the row's columns \('instruction', 'output'\)",
    ):
        load(
            tokenizer,
            write_data(
                d=(
                    {"columns": {"prompt": "q", "response": "output"}},
                    [{"instruction": "Q", "output": "A"}],
                )
            ),
        )


# -- odd entries and damaged files -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": 3}, "file_name of data set 'd' must be a text; found 3"),
        (
            {"file_name": ["a.json", "b.json"]},
            r"file_name of data set 'd' must be a text; found \[\"a.json\", \"b.json\"\]",
        ),
        ({"file_name": None}, "neither file_name nor hf_hub_url"),
        ({"file_name": ""}, "file_name of data set 'd' must be a text"),
        ({"hf_hub_url": {"a": 1}}, "hf_hub_url of data set 'd' must be a text"),
        ({"cloud_file_name": 1.5}, "cloud_file_name of data set 'd' must be a text"),
        ({"subset": 3}, "subset of data set 'd' must be a text"),
        ({"formatting": ["openai"]}, "formatting of data set 'd' must be a text"),
        ({"formatting": "chatgpt"}, "formatting is 'chatgpt'; known are alpaca, sharegpt, openai"),
        ({"ranking": "yes"}, "ranking of data set 'd' must be true or false; found \"yes\""),
        ({"num_samples": "all"}, "num_samples of data set 'd' must be a whole number"),
        ({"num_samples": -1}, "num_samples of data set 'd' must be a whole number"),
        (
            {"columns": {"prompt": ["q", "r"]}},
            "columns: prompt of data set 'd' must be the name of one column, a text; found",
        ),
        ({"columns": ["q"]}, "columns of data set 'd' is not a mapping"),
        ({"tags": {"user_tag": 1}}, "tags: user_tag of data set 'd' must be a text; found 1"),
        (None, "data set 'd' is not a mapping"),
        (["d.json"], "data set 'd' is not a mapping"),
    ],
)
def test_odd_entries_are_sentences(entry: Any, message: str, tmp_path: Path) -> None:
    made = {"file_name": "d.json"} | entry if isinstance(entry, dict) else entry
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": made}))
    with pytest.raises(DataError, match=message):
        read_sources(["d"], str(tmp_path))


def test_null_stands_for_a_key_that_is_not_given(write_data: Any) -> None:
    entry = {
        "hf_hub_url": None,
        "formatting": None,
        "columns": None,
        "tags": None,
        "ranking": None,
        "num_samples": None,
        "split": None,
    }
    given, plain = (read_sources(["d"], str(write_data(d=(e, []))))[0] for e in (entry, {}))
    assert given == plain


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b"{", b"\xff{}", b"[" * 100_000])
def test_an_odd_dataset_info_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset_info\.json (is not valid JSON|holds a)"):
        read_sources(["d"], str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow file"])
def test_damaged_tables_are_sentences(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    table = pa.table(
        {"instruction": [f"Question {i}?" for i in range(5000)], "output": ["An answer."] * 5000}
    )
    path = tmp_path / f"d.{kind.split()[0]}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file)(
            str(path), table.schema
        ) as writer:
            writer.write_table(table, max_chunksize=1000)
    good = path.read_bytes()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": path.name}}))
    middle = len(good) // 2
    damaged = [
        b"",
        good[:8],
        good[:middle],
        good[: middle - 500] + bytes(1000) + good[middle + 500 :],
        bytes(len(good)),
        b"PAR1" + good,
    ]
    sentences = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            load(tokenizer, tmp_path)
        # some damage spoils texts and no structure: then rows are trained or bad
        except DataError as e:
            sentences += f"{path.name} cannot be read after row " in str(e)
    assert sentences >= 4


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "/etc/passwd"}, "names the file '/etc/passwd', outside of the folder"),
        ({"file_name": "../../x.json"}, "outside of the folder"),
        ({"file_name": "a/../../x.json"}, "outside of the folder"),
        ({"file_name": "..\\x.json"}, "outside of the folder"),
        ({"file_name": "~/x.json"}, "outside of the folder"),
        ({"file_name": "C:\\x.json"}, "outside of the folder"),
        ({"cloud_file_name": "file:///etc/x.json"}, "is not on another machine"),
        ({"cloud_file_name": "/etc/x.json"}, "is not on another machine"),
        ({"cloud_file_name": "simplecache::file:///etc/x.json"}, "is not on another machine"),
        ({"cloud_file_name": "s3://b/x.zip::/etc/x"}, "is not on another machine"),
        ({"hf_hub_url": "HERE"}, "a path of this machine"),
        ({"hf_hub_url": "../.."}, "a path of this machine"),
        ({"hf_hub_url": "/etc"}, "a path of this machine"),
    ],
)
def test_a_strangers_dataset_info_names_nothing_of_this_machine(
    entry: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HERE").mkdir()
    remote_info(tmp_path, {"d": entry}, monkeypatch)
    with pytest.raises(DataError, match=f"Data set 'd' of REMOTE:a/b .*{re.escape(words)}"):
        read_sources(["d"], "REMOTE:a/b")


def test_a_strangers_dataset_info_names_files_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("not this one")
    info = {
        "file": {"file_name": "x.json"},
        "hub": {"hf_hub_url": "someone/data"},
        "cloud": {"cloud_file_name": "s3://bucket/x.jsonl"},
    }
    asked = remote_info(tmp_path, info, monkeypatch)
    file, far, cloud = read_sources(["file", "hub", "cloud"], "REMOTE:a/b")
    assert asked == [("a/b", "dataset_info.json"), ("a/b", "x.json")]
    assert file.files() == [tmp_path / "snapshot" / "x.json"]
    assert (far.location, cloud.location) == ("someone/data", "s3://bucket/x.jsonl")
    with pytest.raises(DataError, match="'absent' is not in dataset_info\.json"):
        read_sources(["absent"], "REMOTE:a/b")
    with pytest.raises(DataError, match=r"'x\.json' is not in dataset_info\.json"):
        read_sources(["x.json"], "REMOTE:a/b")  # a file here, of that name


def remote_info(
    tmp_path: Path, info: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str]]:
    """The hub has a data set with this dataset_info.json and a file x.json. Returns what is asked
    for.
    """
    import huggingface_hub

    from longfactory import hub

    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "x.json").write_text("[]")
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo_id, filename))
        return str(folder / filename)

    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked
