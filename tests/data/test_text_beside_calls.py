"""Text and reasoning that stand beside calls of tools are trained, by each template."""

from __future__ import annotations

import copy
from typing import Any

import lf_oracle
import pytest

from conversations import OPENAI, WEATHER, answer, call, documents, load, trained, user, whole
from data_arguments import make_args

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
        "these fields are not used: assistant's content next to tool_calls (1 rows, first d.json row 1),"
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
