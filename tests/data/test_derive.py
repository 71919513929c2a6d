"""Templates derived from a model's own chat template."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest

from data_arguments import make_args
from longfactory.data.derive import ChatTemplate, check
from longfactory.data.errors import BadRow
from longfactory.data.module import load_datasets
from longfactory.data.row import IGNORE
from longfactory.data.template import Message, chat_template
from longfactory.data.template_table import TABLE
from longfactory.data.templates import get_template
from longfactory.errors import UserError

GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}CALL {{ m.tool_calls |"
    " tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + GENERATE
)
# As Qwen3's: thoughts of earlier answers are dropped, the last answer gets an empty one.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last"
    " %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + GENERATE
)
CHAT = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
}
TWO_TURNS = [
    {"from": "human", "value": "Q1"},
    {"from": "gpt", "value": "A1"},
    {"from": "human", "value": "Q2"},
    {"from": "gpt", "value": "A2"},
]


def as_messages(conversation: list[dict]) -> list[dict]:
    return [
        {"role": {"human": "user", "gpt": "assistant"}[m["from"]], "content": m["value"]}
        for m in conversation
    ]


def load(
    tokenizer: Any,
    rows: list[dict],
    write_data: Any,
    stage: str = "sft",
    info: dict | None = None,
    **options: Any,
) -> Any:
    args = make_args(
        dataset="d", dataset_dir=str(write_data(d=(info or CHAT, rows))), template=None, **options
    )
    return load_datasets(
        args, stage=stage, tokenizer=tokenizer, template=get_template(args, tokenizer), seed=0
    ).train


def trained(document: Any, tokenizer: Any) -> str:
    return tokenizer.decode([t for t in document.labels if t != IGNORE])


def test_a_plain_template_is_exact(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = CHATML
    data = load(tokenizer, [{"conversations": TWO_TURNS, "system": "Be brief."}], write_data)
    messages = [
        {"role": r, "content": c}
        for r, c in (
            ("system", "Be brief."),
            ("user", "Q1"),
            ("assistant", "A1"),
            ("user", "Q2"),
            ("assistant", "A2"),
        )
    ]
    assert list(data[0][0].input_ids) == tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False
    )
    assert trained(data[0][0], tokenizer) == "A1<|im_end|>\nA2<|im_end|>\n"
    assert not caplog.records


def test_a_template_that_rewrites_history_trains_the_last_answer(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = REWRITES
    data = load(
        tokenizer, [{"conversations": TWO_TURNS}, {"conversations": TWO_TURNS[:2]}], write_data
    )
    assert "only the last answer of a multi-turn conversation is trained" in caplog.text
    assert data.report.last_answer_only == 1
    messages = as_messages(TWO_TURNS)
    assert tokenizer.decode(data[0][0].input_ids) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert trained(data[0][0], tokenizer) == "<think>\n\n</think>\n\nA2<|im_end|>\n"
    assert trained(data[1][0], tokenizer) == "<think>\n\n</think>\n\nA1<|im_end|>\n"


def test_tools_reach_the_template(tokenizer: Any, write_data: Any) -> None:
    tokenizer.chat_template = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + CHATML
    call = {"name": "f", "arguments": {"x": 1}}
    conversation = [
        TWO_TURNS[0],
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "R"},
        TWO_TURNS[3],
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    data = load(
        tokenizer, [{"conversations": conversation, "tools": json.dumps(tools)}], write_data
    )
    text = tokenizer.decode(data[0][0].input_ids)
    assert text.startswith("TOOLS [") and "<|im_start|>tool\nR<|im_end|>" in text
    answer = trained(data[0][0], tokenizer)
    assert answer.startswith(
        'CALL [{"type": "function", "function": {"name": "f"'
    ) and answer.endswith("A2<|im_end|>\n")


def test_pairs_and_kto(tokenizer: Any, write_data: Any) -> None:
    tokenizer.chat_template = CHATML
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    pair = load(
        tokenizer,
        [{"q": "Q", "good": "Yes", "bad": "No"}],
        write_data,
        "dpo",
        {"ranking": True, "columns": columns},
    )
    assert [trained(d, tokenizer) for d in pair[0]] == ["Yes<|im_end|>\n", "No<|im_end|>\n"]
    rows = [{"q": "Q", "a": "Yes", "t": True}, {"q": "P", "a": "No", "t": False}]
    kto = load(
        tokenizer,
        rows,
        write_data,
        "kto",
        {"columns": {"prompt": "q", "response": "a", "kto_tag": "t"}},
    )
    assert [trained(d, tokenizer) for d in kto[0]] == ["Yes<|im_end|>\n", "No<|im_end|>\n"]


def test_warnings_and_refusals(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    assert check(ChatTemplate(tokenizer)) == []
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    assert "does not support a system message" in " ".join(check(ChatTemplate(tokenizer)))
    # An answer that begins with a blank: "Assistant:" + " A" is one piece of text to the model's
    # own tokenisation.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        + "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert "merges tokens across the border" in " ".join(check(ChatTemplate(tokenizer)))
    tokenizer.chat_template = "{{ raise_exception('broken') }}"
    with pytest.raises(
        UserError,
        match="cannot be used for training: the chat template refuses the conversation: broken",
    ):
        check(ChatTemplate(tokenizer))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt"
        " %}assistant>{% endif %}"
    )
    with pytest.raises(BadRow, match="does not begin where its generation prompt ends"):
        ChatTemplate(tokenizer).one_turn(
            [Message("user", "a")], [Message("assistant", "b")], None, None
        )


@pytest.mark.parametrize(
    "name",
    [
        "qwen",
        "llama3",
        "gemma",
        "mistral",
        "vicuna",
        "alpaca",
        "default",
        "zephyr",
        "llama2",
        "deepseek3",
    ],
)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_chat_template_written_for_a_table_template(
    name: str, system: str, tokenizers: dict[str, Any], write_data: Any
) -> None:
    """A tokenizer without a chat template is given one; it renders what training showed the model."""
    tokenizer = copy.deepcopy(tokenizers["byte"])
    folder = write_data(d=(CHAT, [{"conversations": TWO_TURNS, "system": system}]))
    args = make_args(template=name, dataset="d", dataset_dir=str(folder))
    data = load_datasets(
        args, stage="sft", tokenizer=tokenizer, template=get_template(args, tokenizer), seed=0
    ).train
    messages = as_messages(TWO_TURNS)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    assert tokenizer.chat_template
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.decode(
        data[0][0].input_ids
    )


def test_no_jinja_for_tokens_named_by_text(tokenizer: Any) -> None:
    assert chat_template(TABLE["chatglm3"], tokenizer) is None


def test_names_and_options_are_checked(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    for options, message in (
        ({"template": "qwen33"}, "Template 'qwen33' is not known. Did you mean qwen3"),
        ({"template": "glm4", "train_on_prompt": True}, "cannot be used with train_on_prompt"),
        ({"template": "qwen", "tool_format": "quwen"}, "tool_format 'quwen' is not known"),
        ({"template": "qwen", "template_compat": "0.8"}, "template_compat is '0.8'"),
    ):
        with pytest.raises(UserError, match=message):
            get_template(make_args(**options), tokenizer)
    assert get_template(make_args(template=None), tokenizer).name == "empty"
    assert "no chat template" in caplog.text
    caplog.clear()
    caplog.set_level(logging.WARNING)
    get_template(make_args(template="qwen3"), tokenizer)
    assert "_nothink" in caplog.text
