"""Rows to conversations: the alpaca, sharegpt and openai formats in one normal form."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from longfactory.data.errors import BadRow
from longfactory.data.sources import Source
from longfactory.data.template import Message, MessageRole


@dataclasses.dataclass(frozen=True)
class Conversation:
    """`prompt` has an odd number of messages and ends with a user's or a tool's. `answers` has one message; two for a pair (chosen,
    rejected); none for plain text. `desired` is KTO's tag."""

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    system: str = ""
    tools: str = ""
    desired: bool | None = None


def convert(row: dict[str, Any], source: Source) -> Conversation:
    """The conversation of a row.

    Raises:
        BadRow: the row lacks a column, has a content that is not text, has roles in a wrong order, or carries media.
    """
    for column in (source.images, source.videos, source.audios):
        if column and row.get(column):
            raise BadRow(f"media: the row has {column}, and only text is trained")
    if source.formatting == "alpaca":
        return _alpaca(row, source)
    return _messages(row, source)


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    raise BadRow(f"not text: {what} is {'empty (null)' if value is None else 'a ' + type(value).__name__}")


def _optional(row: dict[str, Any], column: str | None) -> Any:
    return row.get(column) if column else None


def _system(row: dict[str, Any], source: Source) -> str:
    value = _optional(row, source.system)
    return "" if value is None else _text(value, f"column {source.system!r}")


def _tools(row: dict[str, Any], source: Source) -> str:
    value = _optional(row, source.tools)
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return _text(value, f"column {source.tools!r}")


def _desired(row: dict[str, Any], source: Source) -> bool | None:
    if not source.kto_tag:
        return None
    value = row.get(source.kto_tag)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise BadRow(f"no label: column {source.kto_tag!r} must be true or false; found {value!r}")
    return value


def _alpaca(row: dict[str, Any], source: Source) -> Conversation:
    wanted = [c for c in (source.prompt, source.query) if c]
    if not any(c in row for c in wanted):
        raise BadRow(f"missing column: {source.prompt!r} is not among {sorted(row)}")
    messages = []
    past = _optional(row, source.history)
    if past is not None and not isinstance(past, (list, tuple)):
        raise BadRow(f"not a list: column {source.history!r} must be a list of [user, assistant] pairs")
    for pair in past or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow(f"history: column {source.history!r} must be a list of [user, assistant] pairs")
        messages.append(Message("user", _text(pair[0], "a message of the history")))
        messages.append(Message("assistant", _text(pair[1], "a message of the history")))
    parts = [_text(row[c], f"column {c!r}") for c in wanted if row.get(c) not in (None, "")]
    messages.append(Message("user", "\n".join(parts)))
    desired = _desired(row, source)
    answers: tuple[Message, ...] = ()
    if desired is None and source.ranking:
        for column in (source.chosen, source.rejected):
            if not column or column not in row:
                raise BadRow(f"missing column: {column!r} is not among {sorted(row)}")
            answers += (Message("assistant", _text(row[column], f"column {column!r}")),)
    elif source.response and row.get(source.response) is not None:
        answers = (Message("assistant", _text(row[source.response], f"column {source.response!r}")),)
    return Conversation(tuple(messages), answers, _system(row, source), _tools(row, source), desired)


def _messages(row: dict[str, Any], source: Source) -> Conversation:
    if not source.messages or source.messages not in row:
        raise BadRow(f"missing column: {source.messages!r} is not among {sorted(row)}")
    rows = row[source.messages]
    if not isinstance(rows, (list, tuple)):
        raise BadRow(f"not a list: column {source.messages!r} is a {type(rows).__name__}")
    rows = list(rows)
    system = _system(row, source)
    if rows and source.system_tag and isinstance(rows[0], dict) and rows[0].get(source.role_tag) == source.system_tag:
        system = _content(rows.pop(0), source)
    found = [_message(m, source) for m in rows]
    if source.formatting == "openai":
        found = _join_tool_results(found)
    for i, message in enumerate(found):
        expected = ("user", "observation") if i % 2 == 0 else ("assistant", "function")
        if message.role not in expected:
            raise BadRow(f"wrong role order: message {i + 1} is from {message.role}; expected {' or '.join(expected)}")
    desired = _desired(row, source)
    if desired is None and source.ranking:
        if len(found) % 2 == 0:
            raise BadRow("wrong role order: a pair's conversation must end with a user's message")
        prompt, answers = found, []
        for column in (source.chosen, source.rejected):
            if not column or not isinstance(row.get(column), dict):
                raise BadRow(f"missing column: {column!r} must hold a message")
            answers.append(_message(row[column], source))
            if answers[-1].role not in ("assistant", "function"):
                raise BadRow(f"wrong role order: {column!r} is from {answers[-1].role}")
    else:
        if not found or len(found) % 2:
            raise BadRow("wrong role order: the conversation must end with an answer" if found else "no message: the conversation is empty")
        prompt, answers = found[:-1], found[-1:]
    tools = _tools(row, source)
    if source.openai_quirks and source.formatting == "openai":
        system = _detailed_thinking(system, tools)
    return Conversation(tuple(prompt), tuple(answers), system, tools, desired)


def _message(message: Any, source: Source) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"not a message: found a {type(message).__name__}")
    tag = message.get(source.role_tag)
    roles: dict[Any, MessageRole] = {
        source.user_tag: "user",
        source.assistant_tag: "assistant",
        source.observation_tag: "observation",
        source.function_tag: "function",
    }
    role = roles.get(tag) if tag is not None else None
    if role is None and source.formatting == "openai":
        role = {"user": "user", "assistant": "assistant", "tool": "observation"}.get(str(tag))  # type: ignore[assignment]
    if role is None:
        known = ", ".join(repr(t) for t in roles if t)
        hint = ' (add "system_tag": "system" to the tags)' if tag == "system" and source.system_tag is None else ""
        raise BadRow(f"unknown role: {tag!r} is not among {known}{hint}")
    if source.formatting == "openai" and role in ("assistant", "function") and message.get("tool_calls"):
        return Message("function", _openai_calls(message["tool_calls"], source.openai_quirks))
    return Message(role, _content(message, source))


def _content(message: dict[str, Any], source: Source) -> str:
    if source.content_tag not in message:
        raise BadRow(f"missing column: a message has no {source.content_tag!r}, only {sorted(message)}")
    content = message[source.content_tag]
    if source.formatting == "openai" and isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise BadRow("media: a message has parts that are not text, and only text is trained")
        return "".join(_text(p.get("text"), "a text part") for p in content)
    return _text(content, f"a message's {source.content_tag!r}")


def _openai_calls(calls: Any, quirks: bool) -> str:
    """`tool_calls` of an assistant's message as a JSON list of functions."""
    try:
        functions = [call["function"] for call in calls]
        # The API sends arguments as a JSON string; templates want the object (with the quirks, they get the string).
        if not quirks:
            functions = [f | {"arguments": json.loads(f["arguments"])} if isinstance(f.get("arguments"), str) else f for f in functions]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError):
        raise BadRow("a tool call is not JSON: tool_calls must be a list of {'function': {'name', 'arguments'}}") from None
    return json.dumps(functions, ensure_ascii=False)


def _join_tool_results(messages: list[Message]) -> list[Message]:
    """Results that follow one another become one message."""
    out: list[Message] = []
    for m in messages:
        if m.role == "observation" and out and out[-1].role == "observation":
            out[-1] = Message("observation", out[-1].content + "\n</tool_response>\n<tool_response>\n" + m.content)
        else:
            out.append(m)
    return out


def _detailed_thinking(system: str, tools: str) -> str:
    if not system:
        return "" if tools else "detailed thinking off"
    if tools:
        return system + "\n"
    if "detailed thinking on" in system or "detailed thinking off" in system:
        return system
    return system + "\ndetailed thinking off"
