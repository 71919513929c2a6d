"""Rows to conversations: the same rows give the same tokens in every kind of file, and no field of
theirs is lost without a word.
"""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import lf_oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from conftest import make_args

from longfactory.data.derive import NOT_AT_PROMPT
from longfactory.data.module import load_datasets
from longfactory.data.row import IGNORE
from longfactory.data.templates import get_template

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}
OPENAI: dict[str, Any] = {
    "formatting": "openai",
    "columns": {"messages": "messages", "tools": "tools"},
    "tags": TAGS,
}


def call(number: int, name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
        **more,
    }


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": content}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": f"The {name}.", "parameters": parameters},
    }


ROME = '{"city": "Rome"}'
# Text and reasoning beside calls, and two results.
WEATHER = [
    {"role": "system", "content": "SYS"},
    user("how warm is it"),
    answer(
        "PLAN: I look it up.",
        reasoning_content="THOUGHT one",
        tool_calls=[call(1, "temp", ROME), call(2, "wind", ROME)],
    ),
    result(1, "20"),
    result(2, "3"),
    answer("It is 20 degrees.", reasoning_content="THOUGHT two"),
]


def load(
    tokenizer: Any,
    folder: Path,
    stage: str = "sft",
    template: str | None = "qwen3_nothink",
    dataset: str = "d",
    **options: Any,
) -> Any:
    args = make_args(dataset_dir=str(folder), dataset=dataset, template=template, **options)
    return load_datasets(
        args, stage=stage, tokenizer=tokenizer, template=get_template(args, tokenizer), seed=0
    ).train


def documents(data: Any) -> list[list[tuple[str, list[int], list[int]]]]:
    samples = [data[i] for i in range(len(data))] if hasattr(data, "lengths") else data
    return [[(d.role, list(d.input_ids), list(d.labels)) for d in sample] for sample in samples]


def whole(data: Any, tokenizer: Any, i: int = 0) -> str:
    return tokenizer.decode(data[i][0].input_ids)


def trained(data: Any, tokenizer: Any, i: int = 0) -> str:
    return tokenizer.decode([t for t in data[i][0].labels if t != IGNORE])


# -- the same rows in every kind of file -----------------------------------------------------------

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


# Writes every message whole: a field more or less is another text.
VERBATIM = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{% for k in m"
    " | sort %}{{ k }}={{ m[k] | tojson }};{% endfor %}<|im_end|>{% endfor %}{# tool_calls"
    " arguments reasoning_content #}"
)


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


# -- text and reasoning beside calls ---------------------------------------------------------------

CALLS = "\n".join(
    f'<tool_call>\n{{"name": "{n}", "arguments": {{"city": "Rome"}}}}\n</tool_call>'
    for n in ("temp", "wind")
)


@pytest.mark.parametrize("name", ["qwen3_nothink", "qwen3"])
def test_text_and_reasoning_beside_calls_are_trained(
    name: str, tokenizer: Any, write_data: Any
) -> None:
    folder = write_data(d=(OPENAI, [{"messages": WEATHER}]))
    data = load(tokenizer, folder, template=name)
    assert (
        trained(data, tokenizer)
        == f"<think>\nTHOUGHT one\n</think>\n\nPLAN: I look it up.\n{CALLS}<|im_end|>\n"
        "<think>\nTHOUGHT two\n</think>\n\nIt is 20 degrees.<|im_end|>\n"
    )
    assert "<tool_response>\n20\n</tool_response>\n<tool_response>\n3\n</tool_response>" in whole(
        data, tokenizer
    )
    assert data.report.bad == 0
    # The thought that is a field is the thought that stands in the text.
    inline = copy.deepcopy(WEATHER)
    inline[2] = answer(
        "<think>\nTHOUGHT one\n</think>\n\nPLAN: I look it up.", tool_calls=WEATHER[2]["tool_calls"]
    )
    inline[5] = answer("<think>\nTHOUGHT two\n</think>\n\nIt is 20 degrees.")
    for options in ({}, {"enable_thinking": False}, {"mask_history": True}):
        one, other = (
            documents(
                load(tokenizer, write_data(d=(OPENAI, [{"messages": m}])), template=name, **options)
            )
            for m in (WEATHER, inline)
        )
        assert one == other
    if name == "qwen3":
        assert "THOUGHT" not in whole(
            load(tokenizer, folder, template=name, enable_thinking=False), tokenizer
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral", 'PLAN[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]<|endoftext|>'),
        (
            "qwen3_5_nothink",
            "PLAN\n\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>\n",
        ),
        ("llama3", 'PLAN\n{"name": "f", "parameters": {"x": 1}}<|eot_id|>'),
        ("default", 'PLAN\nAction: f\nAction Input: {"x": 1}<|endoftext|>\n'),
    ],
)
def test_text_beside_calls_stands_where_the_text_of_an_answer_does(
    name: str, expected: str, tokenizer: Any, write_data: Any
) -> None:
    rows = [{"messages": [user("Q"), answer("PLAN", tool_calls=[call(1, "f", '{"x": 1}')])]}]
    assert (
        trained(load(tokenizer, write_data(d=(OPENAI, rows)), template=name), tokenizer).lstrip(" ")
        == expected
    )


def test_results_of_templates_that_wrap_none_are_lines(tokenizer: Any, write_data: Any) -> None:
    data = load(tokenizer, write_data(d=(OPENAI, [{"messages": WEATHER}])), template="llama3")
    assert "ipython<|end_header_id|>\n\n20\n3<|eot_id|>" in whole(
        data, tokenizer
    ) and "tool_response" not in whole(data, tokenizer)


def test_the_quirks_are_the_tokens_of_0_9_5_and_say_what_they_leave_out(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = lf_oracle.Oracle()
    rows = [{"messages": WEATHER, "tools": ""}]
    for name in ("qwen3", "llama3", "mistral"):
        args = make_args(template=name)
        expected = oracle.encode("sft", rows, OPENAI, copy.deepcopy(tokenizer), args)
        data = load(
            copy.deepcopy(tokenizer),
            write_data(d=(OPENAI | {"openai_quirks": True}, rows)),
            template=name,
        )
        assert (
            list(data[0][0].input_ids) == expected["input_ids"][0]
            and list(data[0][0].labels) == expected["labels"][0]
        )
    assert (
        "nothing reads assistant's content beside tool_calls (1 rows, first d.json row 1),"
        " assistant's reasoning_content" in caplog.text
    )


def test_two_thoughts_that_differ_are_a_bad_row(tokenizer: Any, write_data: Any) -> None:
    rows = [
        {"messages": [user("Q"), answer("A", reasoning="one", reasoning_content="two")]},
        {"messages": [user("Q"), answer("<think>\none\n</think>\n\nA", reasoning="two")]},
        {"messages": [user("Q"), answer("<think>\none\n</think>\n\nA", reasoning="one")]},
        {"messages": [user("Q"), answer("A", reasoning="one", reasoning_content="one")]},
    ]
    data = load(tokenizer, write_data(d=(OPENAI, rows)))
    assert data.report.bad_rows["d"]["reasons"] == {"two thoughts": 2}
    assert (
        trained(data, tokenizer, 0)
        == trained(data, tokenizer, 1)
        == "<think>\none\n</think>\n\nA<|im_end|>\n"
    )


# -- other members of the kind ---------------------------------------------------------------------


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
            if "nothing reads" in r.getMessage()
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
    assert "nothing reads" not in caplog.text


def test_images_and_unfit_messages_are_sentences(tokenizer: Any, write_data: Any) -> None:
    good = {"messages": [user("Q"), answer("A")]}
    bad = [
        (
            [user([{"type": "image_url", "image_url": {"url": "x"}}]), answer("A")],
            "media: the row has images, and the model takes text alone, or its folder has no"
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


# -- the model's own chat template -----------------------------------------------------------------

RESULTS = (
    "{%- for m in messages %}{%- if m.role=='tool' %}{{- '[RESULT]' + m.content + '[/RESULT]' }}{%-"
    " elif m.role=='assistant' and m.tool_calls %}{%- for c in m.tool_calls %}{{- '[CALL]' +"
    " c.function.name }}{%- endfor %}{{- '<|im_end|>' }}{%- elif m.role=='assistant' %}{{-"
    " m.content + '<|im_end|>' }}{%- else %}{{- '<|im_start|>' + m.content + '[/]' }}{%- endif"
    " %}{%- endfor %}"
)
IDS = RESULTS.replace("'[RESULT]'", "'[RESULT ' + m.tool_call_id + ']'").replace(
    "{{- '[CALL]' + c.function.name }}",
    "{%- if c.id is not defined or c.id|length != 9 %}{{- raise_exception('ids of tool calls have 9"
    " characters') }}{%- endif %}{{- '[CALL ' + c.id + ']' + c.function.name }}",
)
TWO_RESULTS = [
    user("warm?"),
    answer("", tool_calls=[call(1, "temp", "{}"), call(2, "wind", "{}")]),
    result(1, "20"),
    result(2, "3"),
    answer("It is 20."),
]
# In the manner of Qwen 3: reasoning, text beside calls, results in one user's turn, arguments as an
# object.
MODERN = (
    "{%- if tools %}TOOLS {{ tools | tojson }}\n{%- endif %}{%- for m in messages %}{%- if m.role"
    " == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{-"
    " '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>'"
    " }}{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%-"
    " endif %}{%- else %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.name %}{{- '(' + m.name + ')"
    " ' }}{%- endif %}{%- if m.reasoning_content %}{{- '<think>\n' + m.reasoning_content +"
    " '\n</think>\n\n' }}{%- endif %}{{- m.content }}{%- for c in m.tool_calls or [] %}{{-"
    " '\n<tool_call>' + c.function.name + ' ' }}{{- c.function.arguments | tojson }}{{-"
    " '</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if"
    " add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def as_the_template_expects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as objects, which is what `apply_chat_template` documents."""
    out = copy.deepcopy(messages)
    for message in out:
        for c in message.get("tool_calls", []):
            if isinstance(c["function"]["arguments"], str):
                c["function"]["arguments"] = json.loads(c["function"]["arguments"])
    return out


@pytest.mark.parametrize(
    ("template", "messages", "learned"),
    [
        (RESULTS, TWO_RESULTS, "[CALL]temp[CALL]wind<|im_end|>It is 20.<|im_end|>"),
        (IDS, TWO_RESULTS, "[CALL call00001]temp[CALL call00002]wind<|im_end|>It is 20.<|im_end|>"),
        (
            MODERN,
            [{"role": "developer", "content": "SYS"}, user("how warm is it", name="Ann"), *WEATHER[2:]],
            "<think>\nTHOUGHT one\n</think>\n\nPLAN: I look it up.\n<tool_call>temp {\"city\": \"Rome\"}</tool_call>\n"
            "<tool_call>wind {\"city\": \"Rome\"}</tool_call><|im_end|>\n<think>\nTHOUGHT two\n</think>\n\nIt is 20 degrees.<|im_end|>\n",
        ),
        (
            MODERN.replace("m.reasoning_content", "m.thinking"),
            [user("Q"), answer("A", thinking="T")],
            "<think>\nT\n</think>\n\nA<|im_end|>\n",
        ),
    ],
    ids=["results", "ids", "modern", "thinking"],
)  # fmt: skip
@pytest.mark.parametrize("with_tools", [False, True])
def test_rows_reach_the_own_template_as_they_are(
    template: str,
    messages: list[dict[str, Any]],
    learned: str,
    with_tools: bool,
    tokenizer: Any,
    write_data: Any,
) -> None:
    tokenizer.chat_template = template
    tools = [tool("temp", city={"type": "string"})] if with_tools else None
    expected = tokenizer.apply_chat_template(
        as_the_template_expects(messages), tools=tools, tokenize=True, return_dict=False
    )
    for described in (tools, json.dumps(tools) if tools else None):
        data = load(
            tokenizer,
            write_data(d=(OPENAI, [{"messages": messages, "tools": described}])),
            template=None,
        )
        assert list(data[0][0].input_ids) == expected
        assert trained(data, tokenizer) == learned


def test_pairs_and_kto_reach_the_own_template_as_they_are(tokenizer: Any, write_data: Any) -> None:
    tokenizer.chat_template = MODERN
    chosen = answer("I look.", reasoning_content="T", tool_calls=[call(3, "temp", ROME)])
    rejected = answer("I do not know.")
    columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    prompt = [*WEATHER, user("And now?")]
    pair = {"messages": prompt, "chosen": chosen, "rejected": rejected}
    data = load(
        tokenizer,
        write_data(d=(OPENAI | {"ranking": True, "columns": columns}, [pair])),
        "dpo",
        None,
    )
    columns = {"messages": "messages", "kto_tag": "label"}
    rows = [{"messages": [*prompt, end], "label": end is chosen} for end in (chosen, rejected)]
    kto = load(tokenizer, write_data(d=(OPENAI | {"columns": columns}, rows)), "kto", None)
    for end, *found in zip((chosen, rejected), data[0], (kto[0][0], kto[1][0]), strict=True):
        messages = as_the_template_expects([*prompt, end])
        expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        asked = tokenizer.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        for document in found:
            assert list(document.input_ids) == expected
            assert [t for t in document.labels if t != IGNORE] == expected[len(asked) :]


def test_reasoning_reaches_a_template_that_knows_another_name_for_it(
    tokenizer: Any, write_data: Any
) -> None:
    for given in ("reasoning", "reasoning_content", "thinking"):
        for known in ("reasoning_content", "thinking"):
            tokenizer.chat_template = MODERN.replace("m.reasoning_content", f"m.{known}")
            data = load(
                tokenizer,
                write_data(d=(OPENAI, [{"messages": [user("Q"), answer("A", **{given: "T"})]}])),
                template=None,
            )
            assert trained(data, tokenizer) == "<think>\nT\n</think>\n\nA<|im_end|>\n"


def test_what_the_own_template_does_not_write_is_told_or_refused(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = RESULTS
    rows = [
        {
            "messages": [user("Q", name="Ann"), answer("A", reasoning_content="T")],
            "tools": [tool("temp")],
        }
    ]
    load(tokenizer, write_data(d=(OPENAI, rows)), template=None)
    assert (
        "nothing reads assistant's reasoning_content (1 rows, first d.json row 1), tools (1 rows"
        in caplog.text
    )
    assert "user's name (1 rows, first d.json row 1)" in caplog.text
    tokenizer.chat_template = MODERN.split("{%- for c in")[0] + "{%- endif %}{%- endfor %}"
    data = load(
        tokenizer, write_data(d=(OPENAI, [*rows, {"messages": TWO_RESULTS}])), template=None
    )
    assert (
        "lost tool calls: the chat template does not write them"
        in data.report.bad_rows["d"]["places"][0][1]
    )


STRINGS = MODERN.replace("{{- c.function.arguments | tojson }}", "{{- c.function.arguments }}")
CONCATENATED = MODERN.replace(
    "{{- c.function.arguments | tojson }}", "{{- '' + c.function.arguments }}"
)


@pytest.mark.parametrize(
    "template", [MODERN, STRINGS, CONCATENATED], ids=["object", "string", "joined"]
)
@pytest.mark.parametrize("arguments", [ROME, json.loads(ROME)], ids=["from_string", "from_object"])
def test_arguments_reach_the_own_template_in_the_form_that_it_writes(
    template: str, arguments: Any, tokenizer: Any, write_data: Any
) -> None:
    tokenizer.chat_template = template
    rows = [{"messages": [user("Q"), answer("", tool_calls=[call(1, "temp", arguments)])]}]
    data = load(tokenizer, write_data(d=(OPENAI, rows)), template=None)
    assert trained(data, tokenizer) == f"\n<tool_call>temp {ROME}</tool_call><|im_end|>\n"
    sharegpt = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps({"name": "temp", "arguments": arguments})},
    ]
    data = load(
        tokenizer,
        write_data(d=({"formatting": "sharegpt"}, [{"conversations": sharegpt}])),
        template=None,
    )
    assert trained(data, tokenizer) == f"\n<tool_call>temp {ROME}</tool_call><|im_end|>\n"


def test_contents_of_parts_reach_the_own_template_as_it_can_take_them(
    tokenizer: Any, write_data: Any
) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    takes = MODERN.replace(
        "{{- m.content }}",
        "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for p in m.content %}{{- '<' +"
        " p.text + '>' }}{%- endfor %}{%- endif %}",
    )
    for template, expected in ((MODERN, "one two"), (takes, "<one ><two>")):
        tokenizer.chat_template = template
        data = load(
            tokenizer,
            write_data(d=(OPENAI, [{"messages": [user(parts), answer("A")]}])),
            template=None,
        )
        assert (
            whole(data, tokenizer)
            == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        )


GENERATION = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}{%"
    " generation %}{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- m.content +"
    " '<|im_end|>' }}{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{-"
    " '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%-"
    " endif %}"
)


def test_a_template_that_marks_what_the_model_writes_is_taken_at_its_word(
    tokenizer: Any, write_data: Any
) -> None:
    """Also where it rewrites earlier answers: every answer is trained as it stands."""
    tokenizer.chat_template = GENERATION
    messages = [
        {"role": "system", "content": "S"},
        user("Q1"),
        answer("A1"),
        user("Q2"),
        answer("A2"),
    ]
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    folder = write_data(d=(OPENAI, [{"messages": messages}]))
    data = load(tokenizer, folder, template=None)
    ids, labels = (list(x) for x in (data[0][0].input_ids, data[0][0].labels))
    assert ids == expected["input_ids"]
    assert [int(t != IGNORE) for t in labels] == expected["assistant_masks"]
    assert trained(data, tokenizer) == "A1<|im_end|><think>\n\n</think>\n\nA2<|im_end|>"
    assert data.report.last_answer_only == 0
    masked = load(tokenizer, folder, template=None, mask_history=True)
    assert (
        trained(masked, tokenizer) == "<think>\n\n</think>\n\nA2<|im_end|>"
        and list(masked[0][0].input_ids) == ids
    )


OPENS_A_THOUGHT = MODERN.replace(
    "assistant\n' }}{%- endif %}", "assistant\n<think>\n' }}{%- endif %}"
)


def test_a_generation_prompt_that_opens_a_thought(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In the manner of DeepSeek R1: a conversation has no thoughts, its generation prompt begins
    one. The tokens are the conversation's.
    """
    tokenizer.chat_template = OPENS_A_THOUGHT
    messages = [user("Q1"), answer("A1"), user("Q2"), answer("A2", reasoning_content="T")]
    data = load(tokenizer, write_data(d=(OPENAI, [{"messages": messages}])), template=None)
    assert whole(data, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained(data, tokenizer) == "A1<|im_end|>\nT\n</think>\n\nA2<|im_end|>\n"
    assert (
        "generation prompt ends with '<think>\\n', which it does not write in front of the answers"
        in caplog.text
    )


def test_calls_that_the_own_template_loses_are_a_bad_row(tokenizer: Any, write_data: Any) -> None:
    tokenizer.chat_template = MODERN.replace("m.tool_calls or []", "m.calls or []")
    sharegpt = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "temp", "arguments": {}}'},
    ]
    good = {"conversations": [sharegpt[0], {"from": "gpt", "value": "A"}]}
    data = load(
        tokenizer,
        write_data(d=({"formatting": "sharegpt"}, [good, {"conversations": sharegpt}])),
        template=None,
    )
    assert data.report.bad_rows["d"]["reasons"] == {"lost tool calls": 1}


def test_text_that_the_own_template_cuts_off_is_told(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = MODERN.replace(
        "{{- m.content }}", "{{- m.content.split('</think>')[-1] }}"
    )
    load(
        tokenizer,
        write_data(d=(OPENAI, [{"messages": [user("Q"), answer("<think>T</think>A")]}])),
        template=None,
    )
    assert (
        "all of an answer's text (the chat template leaves some of it out) (1 rows, first d.json"
        " row 1)" in caplog.text
    )


def chat_templates_of_trl() -> list[str]:
    """Names of the chat templates that TRL holds copies of, as their models publish them (and with
    marks: "_training").
    """
    return sorted(p.stem for p in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


PUBLISHED = (
    "deepseekv3",
    "glm4moe",
    "gptoss",
    "idefics3",
    "llama3_1",
    "nemotron_3_nano",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_training",
)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "turns": (
        [{"role": "system", "content": "S"}, user("Q1"), answer("A1"), user("Q2"), answer("A2")],
        False,
    ),
    "thoughts": (
        [
            user("Q1"),
            answer("A1", reasoning_content="T1"),
            user("Q2"),
            answer("A2", reasoning_content="T2"),
        ],
        False,
    ),
    "a call": (
        [
            user("Q"),
            answer("", tool_calls=[call(1, "temp", ROME)]),
            result(1, "20"),
            answer("It is 20."),
        ],
        True,
    ),
    "calls": (
        [
            user("Q"),
            answer("", tool_calls=[call(1, "temp", ROME), call(2, "wind", ROME)]),
            *WEATHER[3:5],
            answer("20."),
        ],
        True,
    ),
    "all": (WEATHER, True),
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in PUBLISHED else pytest.param(n, marks=pytest.mark.slow)
        for n in chat_templates_of_trl()
    ],
)
def test_published_chat_templates(
    name: str, tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens of a row are those of `apply_chat_template`, or the row is refused: where the template
    refuses it, loses its calls, or writes the conversation before an answer otherwise once the
    answer is there."""
    tokenizer.chat_template = (
        Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    ).read_text()
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    tools = [
        tool("temp", city={"type": "string", "description": "d"}),
        tool("wind", city={"type": "string", "description": "d"}),
    ]
    used = 0
    for messages, with_tools in CONVERSATIONS.values():
        described = tools if with_tools else None
        rows = [{"messages": [user("Q"), answer("A")]}, {"messages": messages, "tools": described}]
        data = load(
            copy.deepcopy(tokenizer),
            write_data(d=(OPENAI, rows)),
            template=None,
            enable_thinking=None,
        )
        expected = None
        as_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for given in (as_the_template_expects(messages), messages, as_parts):
            try:
                expected = tokenizer.apply_chat_template(given, tools=described, tokenize=False)
            except Exception:  # whatever a template raises
                continue
            if messages[-1]["content"] in expected:
                break
        if len(data) == 1:
            ((_, reason),) = data.report.bad_rows["d"]["places"]
            assert reason.split(":")[0] in (
                "lost tool calls",
                "the chat template refuses the conversation",
                NOT_AT_PROMPT,
            )
            continue
        used += 1
        if expected is not None:
            assert whole(data, tokenizer, 1) == expected
        learned, answers = (
            trained(data, tokenizer, 1),
            [m["content"] for m in messages if m["role"] == "assistant"],
        )
        wanted = answers[-1:] if data.report.last_answer_only else answers
        if "all of an answer's text" in caplog.text:
            wanted = [a for a in wanted if not a.startswith("PLAN")]
        assert all(a in learned for a in wanted) and not any(
            m["content"] in learned for m in messages if m["role"] == "user"
        )
    assert used >= 1
