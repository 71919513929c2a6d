"""Content parts of messages that are media, as OpenAI's and Hugging Face's formats have them: each
becomes a placeholder in the text, and its media join those of the row's columns.
"""

from __future__ import annotations

from typing import Any

from longfactory.data.errors import BadRow
from longfactory.data.media.marks import IMAGE, PLACEHOLDER, VIDEO, kind_of
from longfactory.data.sources import DataSource, parsed

_TYPES = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
_AUDIO = ("audio", "audio_url", "input_audio")
_FIELDS = ("image", "video", "image_url", "video_url", "url", "path", "bytes", "file", "value")
"""Where a part holds its media; "value" is the name of LLaMA-Factory's v1."""


def without_media(
    row: dict[str, Any], source: DataSource, columns: dict[str, list[Any]]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The row with placeholders in place of media parts, and all its media in their order.

    Args:
        columns: media of the row's columns by kind; parts without media of their own, and
            placeholders in texts, take them one after the other.
    Raises:
        BadRow: a part is audio, or media stand where no placeholder is read (a system message, one
            of two answers).
    """
    rows = parsed(row.get(source.messages)) if source.messages else None
    messages = rows if isinstance(rows, (list, tuple)) else []
    pairs = [source.chosen, source.rejected] if source.ranking else []
    for column in filter(None, pairs):
        answer = parsed(row.get(column))
        for message in answer if isinstance(answer, (list, tuple)) else [answer]:
            if _has_media(message, source):
                raise BadRow(
                    f"media: {column!r} has a part with media; put them into the row's columns and"
                    " placeholders into the answers"
                )
    if not any(_has_media(m, source) for m in messages):
        return row, columns
    left = {kind: list(media) for kind, media in columns.items()}
    found: dict[str, list[Any]] = {"image": [], "video": []}
    changed = [_message(m, source, left, found) for m in messages]
    for kind, rest in left.items():
        found[kind] += rest
    return row | {str(source.messages): changed}, found


def _has_media(message: Any, source: DataSource) -> bool:
    content = message.get(source.content_tag) if isinstance(message, dict) else None
    return isinstance(content, (list, tuple)) and any(
        isinstance(p, dict) and p.get("type") in (*_TYPES, *_AUDIO) for p in content
    )


def _message(
    message: Any, source: DataSource, left: dict[str, list[Any]], found: dict[str, list[Any]]
) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get(source.content_tag)  # type: ignore[arg-type]
    system = message.get(source.role_tag) in (source.system_tag, "system", "developer")  # type: ignore[arg-type]
    if system and _has_media(message, source):
        raise BadRow("media: a system message has a part with media; put it into a user's message")
    if isinstance(content, str) and not system:
        _take_placeholders(content, left, found)
    if not isinstance(content, (list, tuple)) or system:
        return message
    changed = []
    for part in content:
        kind = _TYPES.get(str(part.get("type"))) if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get("type") in _AUDIO:
            raise BadRow("audio: a message has a part with audio, which is not supported")
        if kind is None:
            text = part if isinstance(part, str) else part.get("text", part.get("value"))
            _take_placeholders(text if isinstance(text, str) else "", left, found)
            changed.append(part)
            continue
        own = _own(part)
        if own is not None:
            found[kind].append(own)
        elif left[kind]:
            found[kind].append(left[kind].pop(0))
        changed.append({"type": "text", "text": IMAGE if kind == "image" else VIDEO})
    return message | {source.content_tag: changed}


def _take_placeholders(text: str, left: dict[str, list[Any]], found: dict[str, list[Any]]) -> None:
    for placeholder in PLACEHOLDER.findall(text):
        kind = kind_of(placeholder)
        if left[kind]:
            found[kind].append(left[kind].pop(0))


def _own(part: dict[str, Any]) -> Any:
    """The media that a part holds itself; None where it only says that there are some."""
    for field in _FIELDS:
        value = part.get(field)
        if isinstance(value, dict) and field.endswith("_url"):
            value = value.get("url")
        if value is not None:
            return value
    return None
