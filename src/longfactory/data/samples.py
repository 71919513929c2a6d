"""Samples of the training data as text, with the tokens that are trained told from the others: for
the log of a run, and for the data probe of `longfactory verify`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from longfactory.data.row import IGNORE, TokenizedDocument

OF_A_STREAM = 64
"""Samples of a stream among which the longest and the random one are."""
LINES = 12
"""Of a sample on the terminal, so that three of them have less than 40."""
LINES_OF_AN_END, ENDS = 19, 4000
"""Of the sample that a run shows: lines of its head, and of its tail; tokens of either that are
decoded.
"""
WIDTH = 100
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens in a row that are all trained, or all not."""

    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class DecodedDocument:
    """A document as text."""

    role: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class DecodedSample:
    """An item of the training data: a sample, or a packed block of several."""

    which: str
    number: int
    """Its place in the data set, from 0."""
    tokens: int
    trained: int
    documents: tuple[DecodedDocument, ...]


def decoded_samples(dataset: Any, tokenizer: Any, seed: int) -> tuple[DecodedSample, ...]:
    """The first item of the training data, the longest and a random one, as far as they differ."""
    if hasattr(dataset, "__len__"):
        count, lengths, entry = len(dataset), list(dataset.lengths), dataset.__getitem__
    else:
        begin = list(itertools.islice(iter(dataset), OF_A_STREAM))
        count, entry = len(begin), begin.__getitem__
        lengths = [sum(len(d.input_ids) for d in item) for item in begin]
    if not count:
        return ()
    chosen = {0: "first"}
    chosen.setdefault(max(range(count), key=lengths.__getitem__), "longest")
    others = [i for i in range(min(count, 1000)) if i not in chosen]
    if others:
        chosen[random.Random(seed).choice(others)] = "random"
    return tuple(_decoded(entry(i), tokenizer, which, i) for i, which in chosen.items())


def _decoded(
    item: Sequence[TokenizedDocument], tokenizer: Any, which: str, number: int
) -> DecodedSample:
    documents = []
    for d in item:
        pairs = zip(d.input_ids, d.labels, strict=True)
        flags = [(int(token), int(label) != IGNORE) for token, label in pairs]
        parts = [
            Part(_text(tokenizer, [token for token, _ in run]), trained)
            for trained, run in itertools.groupby(flags, key=lambda pair: pair[1])
        ]
        documents.append(DecodedDocument(d.role, tuple(parts)))
    labels = [int(label) for d in item for label in d.labels]
    trained = sum(label != IGNORE for label in labels)
    return DecodedSample(which, number, len(labels), trained, tuple(documents))


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False))


# -- on a terminal ---------------------------------------------------------------------------------


def preview(item: Sequence[TokenizedDocument], tokenizer: Any, stage: str = "sft") -> str:
    """The first training sample for the log of a run, with trained text in `[[ ]]`, or what a
    reward model scores: at most 40 lines, its head and its tail. No more of it is decoded than is
    shown.
    """
    tokens = sum(len(d.input_ids) for d in item)
    trained = sum(int(label) != IGNORE for d in item for label in d.labels)
    what = "trained"
    if stage == "rm":
        what = "answers, scored at their last token"
    lines = [f"{trained:,} of {tokens:,} tokens are {what}, [[like this]]:"]
    if tokens <= 2 * ENDS:
        shown = list(_lines(_decoded(item, tokenizer, "first", 0), "[[", "]]"))
        if len(shown) > 2 * LINES_OF_AN_END:
            left_out = f"    ... {len(shown) - 2 * LINES_OF_AN_END} lines ..."
            shown[LINES_OF_AN_END:-LINES_OF_AN_END] = [left_out]
        return "\n".join(lines + shown).rstrip()
    head = _decoded(_ends(item, ENDS), tokenizer, "first", 0)
    tail = _decoded(_ends(item, -ENDS), tokenizer, "first", 0)
    return "\n".join(
        [
            *lines,
            *list(_lines(head, "[[", "]]"))[:LINES_OF_AN_END],
            "    ...",
            *list(_lines(tail, "[[", "]]"))[-LINES_OF_AN_END:],
        ]
    ).rstrip()


def _ends(item: Sequence[TokenizedDocument], tokens: int) -> list[TokenizedDocument]:
    """The first tokens of a sample, or with a negative number the last ones; documents that are
    left out altogether are empty.
    """
    kept, left = [], abs(tokens)
    for d in item if tokens > 0 else reversed(item):
        n = min(left, len(d.input_ids))
        part = slice(0, n) if tokens > 0 else slice(len(d.input_ids) - n, None)
        kept.append(dataclasses.replace(d, input_ids=d.input_ids[part], labels=d.labels[part]))
        left -= n
    return kept if tokens > 0 else kept[::-1]


def told(samples: Sequence[DecodedSample], colour: bool) -> list[str]:
    """At most 40 lines: the head and tail of each sample. Trained text is green, or, without
    colours, in `[[ ]]`.
    """
    before, after = (GREEN, PLAIN) if colour else ("[[", "]]")
    out = []
    for sample in samples:
        out.append(
            f"sample {sample.number} ({sample.which}): {sample.trained} of {sample.tokens} tokens"
            f" are trained, {before}like this{after}:"
        )
        lines = list(_lines(sample, before, after))
        if len(lines) > LINES:
            half = (LINES - 1) // 2
            left_out = f"    ... {len(lines) - 2 * half} lines ..."
            lines = [*lines[:half], left_out, *lines[-half:]]
        out += lines
    return out


def _lines(sample: DecodedSample, before: str, after: str) -> Iterator[str]:
    """Lines of a terminal's width; each has its own marks, so that any of them may be left out."""
    several = len(sample.documents) > 1
    for number, document in enumerate(sample.documents):
        if not document.parts:
            continue
        mark = f"  {number + 1} {document.role}: " if several else "    "
        for line in _wrapped(document):
            runs = itertools.groupby(line, key=lambda pair: pair[1])
            shown = [_marked(run, trained, before, after) for trained, run in runs]
            yield mark + "".join(shown)
            mark = "    "


def _marked(run: Iterator[tuple[str, bool]], trained: bool, before: str, after: str) -> str:
    text = "".join(character for character, _ in run)
    return f"{before}{text}{after}" if trained else text


def _wrapped(document: DecodedDocument) -> Iterator[list[tuple[str, bool]]]:
    """(character, whether it is trained), in lines of at most `WIDTH`."""
    line: list[tuple[str, bool]] = []
    for part in document.parts:
        for character in part.text.expandtabs(4):
            if character == "\n" or len(line) == WIDTH:
                yield line
                line = []
            if character != "\n":
                line.append((_printable(character), part.trained))
    yield line


def _printable(character: str) -> str:
    """Nothing that would move a terminal's cursor or change its colours."""
    return character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
