"""Media in the text of a conversation: placeholders, marks, and placeholder tokens.

A placeholder (<image>, <video>) in a message is first replaced by a mark that names its unit. What
templates do with the messages leaves marks where they are; in the pieces that come out each mark is
replaced by the text that its family writes. So a unit that a template leaves out is known, and a
text that only looks like a placeholder (in a system message, say) stays text. The model's own chat
template is shown parts ({"type": "image"}) in place of marks, if it knows them, and what it writes
for each is found again by order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from longfactory.data.errors import BadRow
from longfactory.data.formats import Conversation
from longfactory.data.media.marks import IMAGE, MARK, OPEN, PLACEHOLDER, VIDEO, kind_of, mark_of
from longfactory.data.media.measure import Found, measure
from longfactory.data.media.process import Processing
from longfactory.data.media.units import MediaUnit
from longfactory.data.template import Message, Piece

Place = tuple[str, int]  # kind of media, number among its kind


@dataclasses.dataclass(frozen=True)
class Marked:
    """A conversation whose placeholders are marks; `found[n]` is the unit of mark n."""

    conversation: Conversation
    found: tuple[Found, ...]


def mark(conversation: Conversation, processing: Processing, place: str) -> Marked:
    """Replaces the placeholders of a conversation and measures its media.

    Raises:
        BadRow: as many placeholders as media are needed, of each kind; or media cannot be used.
    """
    media = {"image": list(conversation.images), "video": list(conversation.videos)}
    texts = [_all_text(m) for m in (*conversation.prompt, *conversation.answers)]
    _check_texts([*texts, conversation.system, conversation.tools], processing)
    prompt, shared = _marked_messages(conversation.prompt, [])
    answers: list[Message] = []
    orders = [] if conversation.answers else [shared]
    for answer in conversation.answers:
        marked, order = _marked_messages([answer], shared)
        answers += marked
        orders.append(order)
    for order in orders:
        for kind in ("image", "video"):
            count = sum(k == kind for k, _ in order)
            if count != len(media[kind]):
                raise BadRow(
                    f"placeholders: the messages have {count} <{kind}>, and the row has"
                    f" {len(media[kind])} {kind}s"
                )
    order = orders[0]
    if any(other != order for other in orders):
        raise BadRow("placeholders: the two answers show the media in different orders")
    if not order:
        return Marked(conversation, ())
    found = tuple(measure(media[k][i], k, processing, place) for k, i in order)
    changed = dataclasses.replace(conversation, prompt=tuple(prompt), answers=tuple(answers))
    return Marked(changed, found)


def _all_text(message: Message) -> str:
    return message.thought + message.before + message.content


def _check_texts(texts: Sequence[str], processing: Processing) -> None:
    for token in processing.placeholder_texts:
        if token in (IMAGE, VIDEO):
            continue
        if any(token in text for text in texts):
            raise BadRow(
                f"placeholders: the text holds the token {token}, which stands for media; write"
                f" {IMAGE} or {VIDEO}"
            )
    if any(OPEN in text for text in texts):
        raise BadRow("placeholders: the text holds the private character U+E0F0")


def _marked_messages(
    messages: Sequence[Message], before: Sequence[Place]
) -> tuple[list[Message], list[Place]]:
    """The messages with marks, and (kind, number among its kind) of each mark so far."""
    order = list(before)

    def text(value: str) -> str:
        def next_mark(found: re.Match[str]) -> str:
            kind = kind_of(found.group())
            order.append((kind, sum(k == kind for k, _ in order)))
            return mark_of(kind, len(order) - 1)

        return PLACEHOLDER.sub(next_mark, value)

    out = []
    for message in messages:
        first = len(order)
        before_calls = text(message.before)
        content = message.content if message.role == "function" else text(message.content)
        marked = dataclasses.replace(message, before=before_calls, content=content)
        if len(order) > first:
            marked = dataclasses.replace(
                marked,
                results=_again(message.results, first),
                shown=tuple(_shown_again(message.shown, first)),
            )
        out.append(marked)
    return out, order


def _again(texts: Sequence[str], first: int) -> tuple[str, ...]:
    """Texts that repeat what is marked already, with the marks from number `first` on."""
    number = [first]
    return tuple(_replaced(text, number) for text in texts)


def _replaced(text: str, number: list[int]) -> str:
    def next_mark(found: re.Match[str]) -> str:
        number[0] += 1
        return mark_of(kind_of(found.group()), number[0] - 1)

    return PLACEHOLDER.sub(next_mark, text)


def _shown_again(shown: Sequence[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    number = [first]
    out = []
    for message in shown:
        content = message.get("content")
        if message.get("role") in ("system", "developer"):
            out.append(message)
        elif isinstance(content, str):
            out.append(message | {"content": _replaced(content, number)})
        elif isinstance(content, (list, tuple)):
            parts = [
                p | {"text": _replaced(p["text"], number)}
                if isinstance(p, dict) and isinstance(p.get("text"), str)
                else p
                for p in content
            ]
            out.append(message | {"content": parts})
        else:
            out.append(message)
    return out


# -- from pieces to tokens -------------------------------------------------------------------------


def fill(
    parts: Sequence[Sequence[Piece]],
    found: Sequence[Found],
    processing: Processing,
    *,
    branches: bool,
    chat: bool,
    shortened: bool,
) -> tuple[list[list[Piece]], list[list[int]]]:
    """The pieces of a sample's parts with the texts of its media, and for each part the numbers of
    the units in it, in order.

    Args:
        branches: whether every part after the first goes on from the first.
        chat: whether the model's own chat template wrote the pieces, which may write media its own
            way.
        shortened: whether the last turns of the conversation may be left out, as nothing is learnt
            of them.
    Raises:
        BadRow: a template has left media out.
    """
    family = processing.family
    written = {"image": family.written_image, "video": family.written_video}
    forms = [re.escape(form) for form in sorted(set(written.values()))] if chat else []
    pattern = re.compile("|".join([MARK.pattern, *forms]))
    out: list[list[Piece]] = []
    numbers: list[list[int]] = []
    seen_first: list[int] = []
    for at, part in enumerate(parts):
        here: list[int] = []
        before = list(seen_first) if branches else [n for part in numbers for n in part]

        def replace(
            match: re.Match[str], here: list[int] = here, before: list[int] = before
        ) -> str:
            if match.group(1) is not None:
                number = int(match.group(1))
            else:
                number = _next(match.group(), [*before, *here], found, written)
            here.append(number)
            return found[number].measured.text

        out.append([pattern.sub(replace, p) if isinstance(p, str) else p for p in part])
        numbers.append(here)
        if at == 0:
            seen_first = here
    ends = (
        [[*seen_first, *n] for n in numbers[1:]]
        if branches
        else [[n for part in numbers for n in part]]
    )
    for end in ends or [seen_first]:
        missing = len(end) < len(found) and not shortened
        if missing or end != list(range(len(end))):
            raise BadRow(
                f"placeholders: the template writes {len(end)} of the {len(found)} images and"
                " videos of the conversation, or in another order"
            )
    return out, numbers


def _next(text: str, done: Sequence[int], found: Sequence[Found], written: dict[str, str]) -> int:
    """The number of the next unit that is written as `text`."""
    kinds = {kind for kind, form in written.items() if form == text}
    number = next(
        (n for n in range(len(found)) if n not in done and found[n].unit.kind in kinds), None
    )
    if number is None:
        raise BadRow(
            f"placeholders: the text has more {text} than the conversation has images and videos"
        )
    return number


def placed(
    ids: np.ndarray,
    numbers: Sequence[int],
    found: Sequence[Found],
    processing: Processing,
    part: int,
) -> list[MediaUnit]:
    """The units of one part with the places of their tokens in its ids.

    Raises:
        BadRow: the placeholder tokens are not those of its units.
    """
    at = np.flatnonzero(np.isin(ids, processing.placeholder_ids))
    expected = sum(sum(found[n].measured.runs) for n in numbers)
    if len(at) != expected:
        raise BadRow(
            f"placeholders: the text became {len(at)} placeholder tokens, expected {expected}"
        )
    units = []
    start = 0
    for n in numbers:
        spans = []
        for run in found[n].measured.runs:
            spans.append((int(at[start]), run))
            if at[start + run - 1] - at[start] != run - 1:
                raise BadRow("placeholders: other tokens stand between those of one image")
            start += run
        units.append(dataclasses.replace(found[n].unit, spans=tuple(spans), part=part))
    return units
