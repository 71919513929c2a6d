"""Conversations through the model's own chat template: its tokens, what it leaves out, what is
trained.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import trl

from conversations import (
    OPENAI,
    ROME,
    WEATHER,
    answer,
    call,
    load,
    result,
    tool,
    trained,
    user,
    whole,
)
from longfactory.data.derive import NOT_AT_PROMPT
from longfactory.data.row import IGNORE

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


def as_the_template_expects(
    messages: list[dict[str, Any]], template: str = ""
) -> list[dict[str, Any]]:
    """Arguments as objects, which is what `apply_chat_template` documents. Thoughts as `thinking`
    where the template reads that name alone: transformers before 5.21 leaves them out otherwise.
    """
    out = copy.deepcopy(messages)
    for message in out:
        if "reasoning_content" in message and "reasoning_content" not in template:
            message["thinking"] = message["reasoning_content"]
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
        "these fields are not used: assistant's reasoning_content (1 rows, first d.json row 1), tools (1 rows"
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
    assert "generation prompt ends with '<think>\\n', which it does not write" in caplog.text


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
        for given in (
            as_the_template_expects(messages, tokenizer.chat_template),
            messages,
            as_parts,
        ):
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
