"""Placeholders of media in messages, and the marks that stand for them while templates write the
text: private characters around a number, which no tokenizer merges with anything.
"""

from __future__ import annotations

import re
from typing import Any

IMAGE, VIDEO = "<image>", "<video>"
PLACEHOLDER = re.compile(f"{IMAGE}|{VIDEO}")
OPEN = "\ue0f0"
_CLOSES = {"image": "\ue0f1", "video": "\ue0f2"}
_KINDS = {close: kind for kind, close in _CLOSES.items()}
MARK = re.compile(f"{OPEN}(\\d+)([{''.join(_KINDS)}])")


def mark_of(kind: str, number: int) -> str:
    """The mark of media `number` of a conversation."""
    return f"{OPEN}{number}{_CLOSES[kind]}"


def kind_of(placeholder: str) -> str:
    """image or video, of a placeholder in a message."""
    return "image" if placeholder == IMAGE else "video"


def parts_of(text: str, known: frozenset[str]) -> list[dict[str, Any]] | None:
    """A text with marks as the parts that a chat template is shown; None where it has no mark of a
    kind that the template knows.
    """
    out: list[dict[str, Any]] = []
    done = 0
    for found in MARK.finditer(text):
        kind = _KINDS[found.group(2)]
        if kind not in known:
            continue
        if found.start() > done:
            out.append({"type": "text", "text": text[done : found.start()]})
        out.append({"type": kind})
        done = found.end()
    if not done:
        return None
    if done < len(text):
        out.append({"type": "text", "text": text[done:]})
    return out
