"""Conversations of OpenAI's form, with calls of tools, and what the data layer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_arguments import make_args
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


# Writes every message whole: a field more or less is another text.
VERBATIM = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{% for k in m"
    " | sort %}{{ k }}={{ m[k] | tojson }};{% endfor %}<|im_end|>{% endfor %}{# tool_calls"
    " arguments reasoning_content #}"
)
