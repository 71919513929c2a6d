"""Rows to conversations: the alpaca, sharegpt and openai formats in one normal form.

A null is a field that is not there, in whatever file the row stands: a table (parquet, arrow,
`datasets`) fills the fields that a row lacks with nulls, and cannot tell them from the user's own.
So the objects of a row (messages, calls, arguments, tools) lose their null fields. JSON that is
written as a string is the user's text and keeps its nulls.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from longfactory.data.errors import BadRow
from longfactory.data.media.parts import without_media
from longfactory.data.sources import DataSource, parsed
from longfactory.data.template import Message, MessageRole

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TRAINED = ("weight", "loss", "train", "loss_weight")
# Fields that say which call a result belongs to; results are put into the order of their calls.
_LINKS = ("id", "type", "index", "tool_call_id", "call_id")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """`prompt` has an odd number of messages and ends with a user's or a tool's. `answers` has one
    message; two for a pair (chosen, rejected); none for plain text. `desired` is KTO's tag.
    `fields` are the row's messages' fields beyond role and text, as "assistant's name"; `unread`
    are those of them, and the columns of the row, that nothing here has read."""

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    system: str = ""
    tools: str = ""
    desired: bool | None = None
    fields: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    images: tuple[Any, ...] = ()
    """As the row names them (a path, bytes, ...), in the order of their placeholders."""
    videos: tuple[Any, ...] = ()


def convert(row: dict[str, Any], source: DataSource, open_end: bool = False) -> Conversation:
    """The conversation of a row. With `open_end` it may end with a question, and then has no
    answer.

    Raises:
        BadRow: the row lacks a column, has a content that is not text, has roles in a wrong order,
            or carries audio.
    """
    if source.audios and row.get(source.audios):
        raise BadRow(f"audio: the row has {source.audios}, and audio is not supported")
    columns_of_media = {
        "image": _media(row, source.images),
        "video": _media(row, source.videos),
    }
    if source.ranking and source.messages is None and source.formatting == "openai":
        row = _apart(row, source)
        source = dataclasses.replace(source, messages="messages")
    if source.formatting != "alpaca":
        row, columns_of_media = without_media(row, source, columns_of_media)
    conversation = (
        _alpaca(row, source)
        if source.formatting == "alpaca"
        else _Rows(source).conversation(row, open_end)
    )
    if any(columns_of_media.values()):
        conversation = dataclasses.replace(
            conversation,
            images=tuple(columns_of_media["image"]),
            videos=tuple(columns_of_media["video"]),
        )
    used = {getattr(source, key) for key in _COLUMNS_READ[source.formatting]}
    columns = frozenset(
        f"column {c!r}" for c, v in row.items() if c not in used and v not in (None, "", [])
    )
    return (
        dataclasses.replace(conversation, unread=conversation.unread | columns)
        if columns
        else conversation
    )


def _apart(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    """A pair of whole conversations as their common beginning, in `messages`, and two answers.

    Raises:
        BadRow: they are no lists of messages, or differ before their last message.
    """
    pair = []
    for column in (source.chosen, source.rejected):
        messages = parsed(row.get(column)) if column else None
        if not isinstance(messages, (list, tuple)) or len(messages) < 2:
            raise BadRow(
                f"missing column: {column!r} must hold a conversation that ends with an answer"
            )
        pair.append([*messages])
    if pair[0][:-1] != pair[1][:-1]:
        raise BadRow(
            f"no pair: {source.chosen!r} and {source.rejected!r} differ before their last message"
        )
    ends = {str(source.chosen): pair[0][-1:], str(source.rejected): pair[1][-1:]}
    return {**row, **ends, "messages": pair[0][:-1]}


def _media(row: dict[str, Any], column: str | None) -> list[Any]:
    """The media in a column, one or a list of them."""
    value = parsed(row.get(column)) if column else None
    if value is None or (isinstance(value, (str, list, tuple)) and not value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


_MEDIA = ("images", "videos", "audios")
_SHARED_COLUMNS = ("system", "tools", "chosen", "rejected", "kto_tag", *_MEDIA)
_MESSAGE_COLUMNS = ("messages", *_SHARED_COLUMNS)
_COLUMNS_READ = {
    "alpaca": ("prompt", "query", "response", "history", *_SHARED_COLUMNS),
    "sharegpt": _MESSAGE_COLUMNS,
    "openai": _MESSAGE_COLUMNS,
}


def without_nulls(value: Any) -> Any:
    """The value without the null fields of its objects. Nulls in a list stay."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(v) for v in value]
    return value


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    raise BadRow(
        f"not text: {what} is {'empty (null)' if value is None else 'a ' + type(value).__name__}"
    )


def _missing(row: dict[str, Any], column: str | None, key: str) -> str:
    found = ", ".join(map(repr, row)) or "none"
    if column:
        return f"missing column: {column!r} is not among the row's columns ({found})"
    return (
        f"missing column: dataset_info.json does not say which column holds the {key}; the row's"
        f" columns are {found}"
    )


def _optional(row: dict[str, Any], column: str | None) -> Any:
    return row.get(column) if column else None


def _system(row: dict[str, Any], source: DataSource) -> str:
    value = _optional(row, source.system)
    return "" if value is None else _text(value, f"column {source.system!r}")


def _tools(row: dict[str, Any], source: DataSource) -> str:
    value = _optional(row, source.tools)
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        return _json(
            value if source.openai_quirks else without_nulls(value), f"column {source.tools!r}"
        )
    return _text(value, f"column {source.tools!r}")


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as e:  # a date, a decimal number or bytes of a table
        raise BadRow(f"not JSON: {what} holds a value that JSON cannot write ({e})") from None


def _desired(row: dict[str, Any], source: DataSource) -> bool | None:
    if not source.kto_tag:
        return None
    value = row.get(source.kto_tag)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise BadRow(f"no label: column {source.kto_tag!r} must be true or false; found {value!r}")
    return value


def _alpaca(row: dict[str, Any], source: DataSource) -> Conversation:
    wanted = [c for c in (source.prompt, source.query) if c]
    if not any(c in row for c in wanted):
        raise BadRow(_missing(row, source.prompt or source.query, "prompt"))
    messages = []
    past = parsed(_optional(row, source.history))
    if past is not None and not isinstance(past, (list, tuple)):
        raise BadRow(
            f"not a list: column {source.history!r} must be a list of [user, assistant] pairs"
        )
    for pair in past or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow(
                f"history: column {source.history!r} must be a list of [user, assistant] pairs"
            )
        messages.append(Message("user", _text(pair[0], "a message of the history")))
        messages.append(Message("assistant", _text(pair[1], "a message of the history")))
    parts = [_text(row[c], f"column {c!r}") for c in wanted if row.get(c) not in (None, "")]
    messages.append(Message("user", "\n".join(parts)))
    desired = _desired(row, source)
    answers: tuple[Message, ...] = ()
    if desired is None and source.ranking:
        for column in (source.chosen, source.rejected):
            if not column or column not in row:
                raise BadRow(_missing(row, column, "chosen and rejected"))
            answers += (Message("assistant", _text(row[column], f"column {column!r}")),)
    elif source.response and row.get(source.response) is not None:
        answers = (
            Message("assistant", _text(row[source.response], f"column {source.response!r}")),
        )
    return Conversation(
        tuple(messages), answers, _system(row, source), _tools(row, source), desired
    )


class _Rows:
    """Rows of messages, in the sharegpt and openai formats."""

    def __init__(self, source: DataSource):
        self.source = source
        self.openai = source.formatting == "openai"
        self.quirks = self.openai and source.openai_quirks
        self.shows = self.openai and not self.quirks
        self.fields: set[str] = set()
        self.unread: set[str] = set()

    def conversation(self, row: dict[str, Any], open_end: bool) -> Conversation:
        source = self.source
        if not source.messages or source.messages not in row:
            raise BadRow(_missing(row, source.messages, "messages"))
        rows = parsed(row[source.messages])
        if not isinstance(rows, (list, tuple)):
            raise BadRow(f"not a list: column {source.messages!r} is a {type(rows).__name__}")
        rows = [self._object(m) for m in rows]
        system, tools = _system(row, source), _tools(row, source)
        opening: tuple[dict[str, Any], ...] = ()
        if rows and self._is_system(rows[0]):
            first = rows.pop(0)
            if (
                not tools
                and not self.quirks
                and isinstance(first.get("tools"), (list, str))
                and first["tools"]
            ):
                tools = (
                    first["tools"]
                    if isinstance(first["tools"], str)
                    else _json(first["tools"], "a message's 'tools'")
                )
                first = {k: v for k, v in first.items() if k != "tools"}
            system = self._content(first)
            self._note(first, "system", read=())
            opening = (self._shown(first),)
        found = self._in_turns(rows)
        for i, message in enumerate(found):
            expected = ("user", "observation") if i % 2 == 0 else ("assistant", "function")
            if message.role not in expected:
                raise BadRow(
                    f"wrong role order: message {i + 1} is from {message.role}; expected"
                    f" {' or '.join(expected)}"
                )
        if found and opening and self.shows:
            found[0] = dataclasses.replace(found[0], shown=opening + found[0].shown)
        desired = _desired(row, source)
        if desired is None and source.ranking:
            if len(found) % 2 == 0:
                raise BadRow(
                    "wrong role order: a pair's conversation must end with a user's message"
                )
            prompt, answers = (
                found,
                [self._answer(row, column) for column in (source.chosen, source.rejected)],
            )
        elif open_end and desired is None and len(found) % 2:
            prompt, answers = found, []
        else:
            if not found or len(found) % 2:
                raise BadRow(
                    "wrong role order: the conversation must end with an answer"
                    if found
                    else "no message: the conversation is empty"
                )
            prompt, answers = found[:-1], found[-1:]
        if self.quirks:
            system = _detailed_thinking(system, tools)
        fields, unread = frozenset(self.fields), frozenset(self.unread)
        return Conversation(tuple(prompt), tuple(answers), system, tools, desired, fields, unread)

    def _answer(self, row: dict[str, Any], column: str | None) -> Message:
        """The chosen or the rejected answer of a pair: a message, or a list of one."""
        message = parsed(row.get(column)) if column else None
        if isinstance(message, (list, tuple)) and len(message) == 1:
            message = message[0]
        if not isinstance(message, dict):
            raise BadRow(f"missing column: {column!r} must hold a message")
        answer = self._message(self._object(message))
        if answer.role not in ("assistant", "function"):
            raise BadRow(f"wrong role order: {column!r} is from {answer.role}")
        return answer

    def _object(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise BadRow(f"not a message: found a {type(message).__name__}")
        if self.quirks:
            return message
        message = {k: without_nulls(v) for k, v in message.items()}
        return _without_parts_of_v1(message, self.source.content_tag) if self.openai else message

    def _is_system(self, message: dict[str, Any]) -> bool:
        tag = message.get(self.source.role_tag)  # type: ignore[arg-type]
        if self.source.system_tag and tag == self.source.system_tag:
            return True
        return (
            self.openai
            and not self.quirks
            and isinstance(tag, str)
            and tag in ("system", "developer")
        )

    def _in_turns(self, rows: Sequence[dict[str, Any]]) -> list[Message]:
        """The messages, the results of tools that follow one another as one."""
        out: list[Message] = []
        results: list[dict[str, Any]] = []
        for row in rows:
            message = self._message(row)
            if self.openai and message.role == "observation":
                results.append(row)
                continue
            if results:
                out.append(self._results(results, out[-1] if out else None))
                results = []
            out.append(message)
        if results:
            out.append(self._results(results, out[-1] if out else None))
        return out

    def _results(self, rows: list[dict[str, Any]], asked: Message | None) -> Message:
        """The results of tools that follow one another. Templates of the table write them in the
        order of their calls.
        """
        shown = tuple(map(self._shown, rows))
        contents = [self._content(r) for r in rows]
        if self.quirks:
            return Message("observation", "\n</tool_response>\n<tool_response>\n".join(contents))
        order = _call_order(rows, asked)
        contents = [contents[i] for i in order]
        return Message(
            "observation",
            "\n".join(contents),
            results=tuple(contents) if len(rows) > 1 else (),
            shown=shown,
        )

    def _message(self, message: dict[str, Any]) -> Message:
        role = self._role(message)
        shown = (self._shown(message),) if self.shows else ()
        if role not in ("assistant", "function"):
            self._note(message, role, read=("name",) if role == "observation" else ())
            return Message(role, self._content(message), shown=shown)
        calls = self._calls(message) if self.openai else None
        if self.quirks:
            if calls is None:
                self._note(message, role, read=())
                return Message(role, self._content(message))
            if message.get(str(self.source.content_tag)):
                self.unread.add("assistant's content next to tool_calls")
            self._note(message, role, read=("tool_calls",))
            return Message("function", calls)
        self._note(
            message,
            role,
            read=("tool_calls", "function_call", "refusal", *THOUGHTS) if self.openai else (),
        )
        thought = _thought(message) if self.openai else ""
        trained = all(_flag(message, key) is not False for key in TRAINED)
        if calls is not None:
            return Message(
                "function",
                calls,
                before=self._said(message),
                thought=thought,
                trained=trained,
                shown=shown,
            )
        text = (
            self._said(message)
            if self.openai and message.get("refusal") is not None
            else self._content(message)
        )
        if role == "function":
            shown = ()  # its content is the call
        return Message(role, text, thought=thought, trained=trained, shown=shown)

    def _role(self, message: dict[str, Any]) -> MessageRole:
        source = self.source
        tag = message.get(source.role_tag)  # type: ignore[arg-type]
        if not isinstance(tag, str):
            found = (
                f"found {sorted(message)}"
                if tag is None
                else f"{source.role_tag!r} is a {type(tag).__name__}"
            )
            raise BadRow(f"unknown role: a message needs a text in {source.role_tag!r}; {found}")
        roles: dict[Any, MessageRole] = {
            source.user_tag: "user",
            source.assistant_tag: "assistant",
            source.observation_tag: "observation",
            source.function_tag: "function",
        }
        role = roles.get(tag)
        if self.openai and not self.quirks and _is_old_result(message, tag):
            role = "observation"
        if role is None and self.openai:
            role = {"user": "user", "assistant": "assistant", "tool": "observation"}.get(tag)  # type: ignore[assignment]
        if role is None:
            known = ", ".join(repr(t) for t in roles if t)
            hint = (
                ' (add "system_tag": "system" to the tags)'
                if tag == "system" and source.system_tag is None
                else ""
            )
            raise BadRow(f"unknown role: {tag!r} is not among {known}{hint}")
        return role

    def _content(self, message: dict[str, Any]) -> str:
        tag = self.source.content_tag
        if tag not in message and not (tag and self.openai):
            raise BadRow(f"missing column: a message has no {tag!r}, only {sorted(message)}")
        content = message.get(tag)
        if isinstance(content, (list, tuple)):
            return content_text(content)
        return _text(content, f"a message's {tag!r}")

    def _said(self, message: dict[str, Any]) -> str:
        """The text of an answer that may have none, or a refusal in its place."""
        text = "" if message.get(self.source.content_tag) is None else self._content(message)  # type: ignore[arg-type]
        refusal = message.get("refusal")
        if refusal is None:
            return text
        if text:
            raise BadRow("two texts: an answer has both a content and a refusal")
        return _text(refusal, "a message's 'refusal'")

    def _calls(self, message: dict[str, Any]) -> str | None:
        """The calls of an answer as a JSON list of functions; None where it has none."""
        calls = parsed(message.get("tool_calls"))
        if not calls and not self.quirks and message.get("function_call"):
            calls = [{"function": parsed(message["function_call"])}]
        if not calls:
            return None
        try:
            functions = [call["function"] for call in calls]
            if not self.quirks:
                functions = [f | {"arguments": _arguments(f)} for f in functions]
        except (TypeError, KeyError, AttributeError, ValueError):
            raise BadRow(
                "a tool call is not JSON: tool_calls must be a list of {'function': {'name',"
                " 'arguments'}}"
            ) from None
        return _json(functions, "a tool call")

    def _shown(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message as a chat template sees it: with the standard names of its role and content,
        otherwise as the row has it.
        """
        source = self.source
        translated = (source.role_tag, source.content_tag, "function_call", "refusal", *TRAINED)
        shown = {k: v for k, v in message.items() if v is not None and k not in translated}
        names = {
            source.user_tag: "user",
            source.assistant_tag: "assistant",
            source.observation_tag: "tool",
            source.system_tag: "system",
        }
        tag = message.get(source.role_tag)  # type: ignore[arg-type]
        role = names.get(tag, tag)
        if _is_old_result(message, role):
            role = "tool"
        elif role == source.function_tag:
            role = "assistant"
        out: dict[str, Any] = {"role": role}
        if message.get(source.content_tag) is not None:  # type: ignore[arg-type]
            out["content"] = message[source.content_tag]  # type: ignore[index]
        elif role == "assistant" and message.get("refusal") is not None:
            out["content"] = message["refusal"]
        calls = parsed(message.get("tool_calls"))
        if not calls and message.get("function_call"):
            calls = [{"type": "function", "function": parsed(message["function_call"])}]
        if calls:
            shown["tool_calls"] = calls
        return out | shown

    def _note(self, message: dict[str, Any], role: str, read: Iterable[str]) -> None:
        """Which fields of a message were read, and which by nobody."""
        whose = {"observation": "tool", "function": "assistant"}.get(role, role)
        for key, value in message.items():
            if (
                key in (self.source.role_tag, self.source.content_tag, *_LINKS)
                or value is None
                or value in ("", [], {})
            ):
                continue
            if (
                key in TRAINED
                and not self.quirks
                and _flag(message, key) in ((True, False) if whose == "assistant" else (False,))
            ):
                continue
            self.fields.add(f"{whose}'s {key}")
            if key not in read:
                self.unread.add(f"{whose}'s {key}")


def content_text(parts: Sequence[Any]) -> str:
    """The text of a content that is a list of parts, joined.

    Raises:
        BadRow: a part is not text.
    """
    return "".join(map(_part, parts))


def _part(part: Any) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f"not text: a part of a message is a {type(part).__name__}")
    kind = part.get("type", "text")
    if kind == "refusal":
        return _text(part.get("refusal"), "a refusal part")
    if kind not in ("text", "input_text", "output_text"):
        raise BadRow(f"unknown part: a message has a part of the type {kind!r}, expected text")
    return _text(part.get("text", part.get("value")), "a text part")


def _without_parts_of_v1(message: dict[str, Any], content_tag: str | None) -> dict[str, Any]:
    """The message with its thought and its calls beside its content, and texts by their usual name.
    LLaMA-Factory's v1 has them as parts of the content: {"type": "reasoning", "value": "..."},
    {"type": "tool_call", "value": "{...}"}, {"type": "text", "value": "..."}.

    Raises:
        BadRow: a call is no JSON object with a name and arguments.
    """
    content = message.get(content_tag or "")
    if not isinstance(content, list):
        return message
    kept: list[Any] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for part in content:
        if not isinstance(part, dict) or "value" not in part:
            kept.append(part)
            continue
        kind, value = part.get("type", "text"), part["value"]
        if kind == "reasoning":
            thoughts.append(_text(value, "a reasoning part"))
        elif kind == "tool_call":
            call = parsed(value)
            if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
                raise BadRow(
                    "a tool call is not JSON: the value of a tool_call part must be an object with"
                    " name and arguments"
                )
            calls.append({"type": "function", "function": call})
        elif kind == "text" and "text" not in part:
            kept.append({"type": "text", "text": value})
        else:
            kept.append(part)
    found = {**message, str(content_tag): kept}
    if thoughts:
        thought = "".join(thoughts)
        if _thought(message) not in ("", thought):
            raise BadRow("two thoughts: a reasoning part and a field of an answer differ")
        found["reasoning_content"] = thought
    if calls:
        found["tool_calls"] = [*(parsed(message.get("tool_calls")) or ()), *calls]
    return found


def _thought(message: dict[str, Any]) -> str:
    """The reasoning of an answer, which has several names."""
    found = {
        k: _text(message[k], f"a message's {k!r}") for k in THOUGHTS if message.get(k) is not None
    }
    texts = {t for t in found.values() if t.strip()}
    if len(texts) > 1:
        raise BadRow(f"two thoughts: the fields {', '.join(found)} of an answer differ")
    return next(iter(texts), "")


def _flag(message: dict[str, Any], key: str) -> bool | None:
    """Whether an answer is to be learned, by the flag that its row has for it; None where it is no
    flag.
    """
    value = message.get(key)
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _is_old_result(message: dict[str, Any], role: Any) -> bool:
    """A tool's result by its old name, a message from the function of that name. In LLaMA-Factory's
    rows a message of this role is a call, which has no name beside it."""
    return (
        role == "function"
        and isinstance(message.get("name"), str)
        and not message.get("tool_calls")
    )


def _arguments(function: dict[str, Any]) -> Any:
    """The API sends arguments as a JSON string; templates want the object. A call without arguments
    has an empty one.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return json.loads(arguments) if arguments.strip() else {}
    return {} if arguments is None else arguments


def _call_order(rows: list[dict[str, Any]], asked: Message | None) -> list[int]:
    """The places of results in the order of the calls that they belong to; as they are where the
    ids do not tell.
    """
    called = [
        c.get("id")
        for m in (asked.shown if asked else ())
        for c in m.get("tool_calls") or ()
        if isinstance(c, dict)
    ]
    ids = [r.get("tool_call_id") for r in rows]
    known = all(isinstance(i, str) for i in [*called, *ids])
    if not known or len(set(ids)) < len(ids) or set(called) != set(ids) or len(called) != len(ids):
        return list(range(len(rows)))
    return [ids.index(i) for i in called]


def _detailed_thinking(system: str, tools: str) -> str:
    if not system:
        return "" if tools else "detailed thinking off"
    if tools:
        return system + "\n"
    if "detailed thinking on" in system or "detailed thinking off" in system:
        return system
    return system + "\ndetailed thinking off"
