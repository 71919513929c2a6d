"""Rows to conversations: the same rows give the same tokens in every kind of file, and no field of
theirs is lost without a word.
"""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conversations import (
    OPENAI,
    ROME,
    TAGS,
    VERBATIM,
    answer,
    call,
    documents,
    load,
    result,
    tool,
    trained,
    user,
    whole,
)

FORMS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "alpaca": (
        "sft",
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}},
        [
            {"instruction": "Say, \"it\"", "input": "two\nlines", "output": "It: 漢字", "system": "Be brief.", "history": [["Q", "A"]]},
            {"instruction": "Q2", "input": "", "output": "A2", "system": "", "history": []},
        ],
    ),
    "sharegpt": (
        "sft",
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system", "tools": "tools"}},
        [
            {
                "conversations": [
                    {"from": "human", "value": "How warm?"},
                    {"from": "function_call", "value": json.dumps({"name": "temp", "arguments": {"city": "Rome", "unit": None}})},
                    {"from": "observation", "value": "20"},
                    {"from": "gpt", "value": "20."},
                ],
                "system": "S",
                "tools": json.dumps([tool("temp", city={"type": "string"})]),
            },
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "", "tools": ""},
        ],
    ),
    "openai": (
        "sft",
        OPENAI,
        [
            {
                "messages": [
                    user("How warm in Rome?"),
                    answer("I look.", tool_calls=[call(1, "temp", {"city": "Rome", "days": [1, 2]}), call(2, "stop", {})]),
                    result(2, "stopped"),
                    result(1, "20"),
                    answer("20.", reasoning_content="easy"),
                ],
                "tools": [tool("temp", city={"type": "string"}, days={"type": "array", "items": {"type": "integer"}}), tool("stop")],
            },
            {
                "messages": [
                    user("How windy in Oslo?"),
                    {"role": "assistant", "tool_calls": [call(1, "wind", {"place": {"name": "Oslo", "country": "NO"}})]},
                    result(1, "3"),
                    answer("3."),
                ],
                "tools": [tool("wind", place={"type": "object", "description": "where"})],
            },
            {"messages": [{"role": "system", "content": "S"}, user("Q"), answer("A")]},
        ],
    ),
    "preference": (
        "dpo",
        {**OPENAI, "ranking": True, "columns": {**OPENAI["columns"], "chosen": "chosen", "rejected": "rejected"}},
        [
            {
                "messages": [user("How warm in Rome?")],
                "tools": [tool("temp", city={"type": "string"})],
                "chosen": answer("I look.", tool_calls=[call(1, "temp", {"city": "Rome"})]),
                "rejected": answer("I do not know."),
            },
            {
                "messages": [user("Q")],
                "tools": [tool("wind", place={"type": "string"})],
                "chosen": answer("", tool_calls=[call(1, "wind", {"place": "Oslo"})]),
                "rejected": answer("A", reasoning_content="hm"),
            },
        ],
    ),
    "kto": (
        "kto",
        {"columns": {"prompt": "q", "response": "a", "kto_tag": "tag"}},
        [{"q": "Q1", "a": "A1", "tag": True}, {"q": "Q2", "a": "A2", "tag": False}],
    ),
    "pt": ("pt", {"columns": {"prompt": "text"}}, [{"text": "A text, \"quoted\",\nof lines."}, {"text": "Another."}]),
}  # fmt: skip
KINDS = ["json", "jsonl", "csv", "parquet", "arrow", "arrow file"]


def in_tables_order(value: Any) -> Any:
    """Objects with their fields in the order that pyarrow gives them: older versions sort them."""
    if pa.array([{"b": 1, "a": 2}]).type.field(0).name == "b":
        return value
    if isinstance(value, dict):
        return {key: in_tables_order(value[key]) for key in sorted(value)}
    return [in_tables_order(v) for v in value] if isinstance(value, list) else value


def write(folder: Path, info: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> Path:
    """A data set "d" of these rows in a file of this kind; nested columns of csv are JSON strings."""
    folder.mkdir(exist_ok=True)
    path = folder / f"d.{kind.split()[0]}"
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = (
        None
        if kind in ("json", "jsonl", "csv")
        else pa.Table.from_pylist([dict.fromkeys(columns) | row for row in rows])
    )
    match kind:
        case "json":
            path.write_text(json.dumps(rows, ensure_ascii=False))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv":
            with path.open("w", newline="") as f:
                writer = csv.DictWriter(f, columns)
                writer.writeheader()
                writer.writerows(
                    {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
                    for row in rows
                )
        case "parquet":
            pq.write_table(table, path)
        case _:
            make = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
            with make(str(path), table.schema) as writer:
                writer.write_table(table)
    (folder / "dataset_info.json").write_text(json.dumps({"d": {"file_name": path.name} | info}))
    return folder


@pytest.mark.parametrize("template", ["qwen3_nothink", None])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_in_every_kind_of_file(
    form: str, template: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    stage, info, rows = FORMS[form]
    rows = in_tables_order(rows)
    if template is None:
        tokenizer.chat_template = VERBATIM
    expected = None
    for kind in KINDS:
        folder = write(tmp_path / kind.replace(" ", "_"), info, rows, kind)
        whole_set = documents(
            load(copy.deepcopy(tokenizer), folder, stage, template, packing=False)
        )
        stream = load(
            copy.deepcopy(tokenizer),
            folder,
            stage,
            template,
            packing=False,
            streaming=True,
            buffer_size=1,
        )
        assert len(whole_set) == len(rows), kind
        expected = expected or whole_set
        assert whole_set == expected, kind
        assert documents(list(stream)) == expected, kind
    assert expected is not None
    text = "".join(tokenizer.decode(ids) for sample in expected for _, ids, _ in sample)
    assert "null" not in text.replace('"unit": null', "") and "None" not in text


def test_a_null_of_an_object_is_a_field_that_is_not_there_and_json_in_a_string_keeps_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    """A table cannot tell the user's null from its own filler."""
    text = '{"city": "Rome", "unit": null}'
    for arguments, expected in ((json.loads(text), ROME), (text, text)):
        rows = [{"messages": [user("Q"), answer(None, tool_calls=[call(1, "temp", arguments)])]}]
        for kind in ("jsonl", "parquet"):
            data = load(tokenizer, write(tmp_path / kind, OPENAI, rows, kind))
            assert (
                trained(data, tokenizer) == '<tool_call>\n{"name": "temp", "arguments":'
                f" {expected}}}\n</tool_call><|im_end|>\n"
            )


def test_a_table_with_a_map_and_with_a_date(tokenizer: Any, tmp_path: Path) -> None:
    from datetime import date

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    rows = [
        {
            "messages": [user("Q"), answer("A")],
            "tools": [{"name": "f", "parameters": [("type", "object")]}],
        }
    ]
    tools = pa.list_(
        pa.struct([("name", pa.string()), ("parameters", pa.map_(pa.string(), pa.string()))])
    )
    folder = write(tmp_path / "d", OPENAI, rows[:0], "jsonl")
    schema = pa.schema([("messages", pa.list_(message)), ("tools", tools)])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "d.parquet")
    (folder / "dataset_info.json").write_text(
        json.dumps({"d": {"file_name": "d.parquet"} | OPENAI})
    )
    assert '{"name": "f", "parameters": {"type": "object"}}' in whole(
        load(tokenizer, folder), tokenizer
    )
    dated = [
        {
            "messages": [
                user("Q"),
                answer(None, tool_calls=[call(1, "f", {"day": date(2026, 1, 2)})]),
            ]
        },
        rows[0] | {"tools": None},
    ]
    data = load(tokenizer, write(tmp_path / "dated", OPENAI, dated, "parquet"))
    assert (
        "not JSON: a tool call holds a value that JSON cannot write"
        in data.report.bad_rows["d"]["places"][0][1]
    )


def test_what_nothing_reads_is_told_once_with_a_place(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "longfactory.data")
    rows = [
        {
            "messages": [
                user("Q", name="Ann"),
                answer("A", audio={"id": "x"}, refusal=None, logprobs=[]),
            ],
            "id": i,
        }
        for i in range(3)
    ]
    folder = write_data(
        d=(OPENAI, [*rows, {"messages": [user("Q"), answer("A")], "functions": [{"name": "f"}]}])
    )
    for streaming in (False, True):
        caplog.clear()
        data = load(
            tokenizer, folder, streaming=streaming, preprocessing_batch_size=2, buffer_size=1
        )
        list(data) if streaming else data[0]
        told = [
            (r.levelname, r.getMessage())
            for r in caplog.records
            if "these fields are not used:" in r.getMessage()
        ]
        assert (
            told[0][0] == "WARNING"
            and "user's name (" in told[0][1]
            and "assistant's audio (" in told[0][1]
        )
        assert "refusal" not in str(told) and "logprobs" not in str(told)
        assert sum("user's name" in text for _, text in told) == 1
        assert any(level == "INFO" and "column 'id' (" in text for level, text in told)
        assert any(
            level == "WARNING" and "column 'functions' (1 rows, first d.json row 4)" in text
            for level, text in told
        )
    caplog.clear()
    load(tokenizer, folder)  # from the cache
    assert "user's name (3 rows, first d.json row 1)" in caplog.text


def test_fields_of_the_api_that_have_another_name_or_place(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    modern = [
        {"role": "system", "content": "S"},
        user("Q"),
        answer("", tool_calls=[call(1, "f", {"x": 1})]),
        result(1, "R"),
        answer("A"),
    ]
    legacy = [
        {"role": "developer", "content": "S"},
        user([{"type": "text", "text": "Q"}]),
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "f", "arguments": '{"x": 1}'},
        },
        {"role": "function", "name": "f", "content": "R"},
        answer(None, refusal="A"),
    ]
    tools = [tool("f", x={"type": "integer"})]
    rows = [
        {"messages": modern, "tools": tools},
        {"messages": legacy, "tools": json.dumps(tools)},
        {"messages": [legacy[0] | {"tools": tools}, *legacy[1:]]},
    ]
    for template in ("qwen3_nothink", None):
        tokenizer.chat_template = (
            None
            if template
            else VERBATIM.replace("in m | sort", "in ['content', 'tool_calls'] if k in m")
        )
        data = load(tokenizer, write_data(d=(OPENAI, rows)), template=template)
        assert data.report.bad == 0
        texts = [whole(data, tokenizer, i) for i in range(3)]
        if template is None:
            for given, same in (
                ('"id": "call00001", ', ""),
                ('content="";', ""),
                ('[{"type": "text", "text": "Q"}]', '"Q"'),
            ):
                texts = [t.replace(given, same) for t in texts]
        assert texts[0] == texts[1] == texts[2] and ('"R"' in texts[1] or "\nR\n" in texts[1])
    assert "these fields are not used:" not in caplog.text


def test_images_and_unfit_messages_are_sentences(tokenizer: Any, write_data: Any) -> None:
    good = {"messages": [user("Q"), answer("A")]}
    bad = [
        (
            [user([{"type": "image_url", "image_url": {"url": "x"}}]), answer("A")],
            "media: the row has images, and the model takes text alone here: it has no tower, one"
            " of a family that is not read (the log names those that are), or its folder has no"
            " preprocessor_config.json or processor_config.json",
        ),
        ([user([3]), answer("A")], "not text: a part of a message is a int"),
        (
            [{"role": ["user"], "content": "Q"}, answer("A")],
            "unknown role: a message needs a text in 'role'; 'role' is a list",
        ),
        (
            [{"content": "Q"}, answer("A")],
            "unknown role: a message needs a text in 'role'; found ['content']",
        ),
        ([user("Q"), answer("A", refusal="no")], "two texts"),
        ([user("Q"), answer(None, tool_calls=[{"name": "f"}])], "a tool call is not JSON"),
        ([user("Q"), answer(None)], "not text: a message's 'content' is empty (null)"),
    ]
    data = load(tokenizer, write_data(d=(OPENAI, [good, *({"messages": m} for m, _ in bad)])))
    found = [reason for _, reason in data.report.bad_rows["d"]["places"]]
    assert all(
        reason.startswith(expected) for reason, (_, expected) in zip(found, bad, strict=True)
    ), found


@pytest.mark.parametrize("formatting", ["openai", "sharegpt"])
@pytest.mark.parametrize("template", ["chatml", "glm4"])
def test_answers_that_the_row_excludes_are_shown_and_not_trained(
    formatting: str, template: str, tokenizer: Any, write_data: Any
) -> None:
    info = (
        OPENAI
        if formatting == "openai"
        else {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
    )

    def row(*flags: Any) -> dict[str, Any]:
        messages = []
        for i, flag in enumerate(flags):
            messages += [user(f"Q{i}"), answer(f"A{i}", **({} if flag is None else flag))]
        return {"messages": messages}

    rows = [
        row(None, None, None),
        row({"weight": 0}, {"weight": 1}, None),
        row({"train": True}, {"train": False}, {"loss": True}),
        row(None, None, {"loss": False}),
        row({"weight": 0}, {"weight": 0}),
    ]
    data = load(tokenizer, write_data(d=(info, rows)), template=template)
    assert data.report.bad_rows["d"]["reasons"] == {"no answer": 1}
    answers = [
        [a for a in ("A0", "A1", "A2") if a in trained(data, tokenizer, i)] for i in range(4)
    ]
    assert answers == [["A0", "A1", "A2"], ["A1", "A2"], ["A0", "A2"], ["A0", "A1"]]
    ids = [list(data[i][0].input_ids) for i in range(4)]
    assert ids[0] == ids[1] == ids[2] and "A2" not in whole(data, tokenizer, 3)
    unmasked = load(tokenizer, write_data(d=(info, [row(None, None)])), template=template)
    assert documents(unmasked)[0] == documents(data)[3]
