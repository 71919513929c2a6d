"""Rows to stored parts: conversion and tokenisation, a chunk of rows at a time, in one process or
in several.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from longfactory.data.derive import ChatTemplate
from longfactory.data.errors import BadRow, BadRows, bad_row_sentence
from longfactory.data.formats import Conversation, convert
from longfactory.data.kind import Kind, PartOptions
from longfactory.data.media import text
from longfactory.data.media.measure import Found
from longfactory.data.media.process import Processing, Unusable
from longfactory.data.media.units import MediaUnit
from longfactory.data.readers import Raw, parse_line
from longfactory.data.sources import DataSource, hint
from longfactory.data.store import FORMAT, Chunk
from longfactory.data.template import Piece, Template
from longfactory.data.tokens import PieceTokenizer, check_text
from longfactory.errors import DataError
from longfactory.processes import die_with_parent
from longfactory.progress import moved


@dataclasses.dataclass(frozen=True)
class _Media:
    """The media of one sample before its pieces are tokenised: `numbers[p]` are those of part p."""

    found: tuple[Found, ...]
    numbers: list[list[int]]
    processing: Processing

    @property
    def notes(self) -> set[str]:
        return {note for found in self.found for note in found.notes}

    def placed(self, ids: list[np.ndarray]) -> list[MediaUnit]:
        """The units, with the places of their tokens in the ids of their part."""
        return [
            unit
            for part, (own, numbers) in enumerate(zip(ids, self.numbers, strict=True))
            for unit in text.placed(own, numbers, self.found, self.processing, part)
        ]


@dataclasses.dataclass
class Preparer:
    """Everything that turns rows of one data set into parts. Made once and handed to the tokenising
    processes. `strict`: a bad row is an error. `media`: how images and videos are processed, or
    why they cannot be; None for a model that takes text alone.
    """

    kind: Kind
    source: DataSource
    template: Any
    tokenizer: PieceTokenizer
    options: PartOptions
    strict: bool = False
    media: Processing | Unusable | None = None

    def chunk(self, rows: list[tuple[int, str, Raw]]) -> Chunk:
        """[(row number, place, raw row)] -> the stored parts.

        Raises:
            DataError: a bad row, where bad rows are errors.
        """
        groups: list[list[Piece]] = []
        counts, flags, numbers, places = [], [], [], []
        media: list[_Media | None] = []
        bad = BadRows()
        for number, place, raw in rows:
            try:
                if isinstance(raw, BadRow):
                    raise raw
                row = parse_line(raw) if isinstance(raw, bytes) else raw
            except BadRow as e:
                self._bad(bad, place, e)
                continue
            try:
                conversation = convert(row, self.source, self.options.questions)
                parts, flag, found = self._parts(conversation, place)
                check_text(parts)
            except BadRow as e:
                if not bad.hint:
                    bad.hint = hint(self.source, row)
                self._bad(bad, place, e, bad.hint)
                continue
            for field in (*self._unread(conversation), *(found.notes if found else ())):
                bad.add_unread(field, place)
            groups += parts
            counts.append(len(parts))
            flags.append(flag)
            numbers.append(number)
            places.append(place)
            media.append(found)
        ids = self.tokenizer.pieces(groups)
        kept = np.ones(len(counts), bool)
        units: list[list[MediaUnit]] = [[] for _ in counts]
        if any(media):
            starts = np.cumsum([0, *counts])
            for i, found in enumerate(media):
                if found is None:
                    continue
                try:
                    units[i] = found.placed(ids[starts[i] : starts[i + 1]])
                except BadRow as e:
                    self._bad(bad, places[i], e)
                    kept[i] = False
            if not kept.all():
                of_part = np.repeat(kept, counts)
                ids = [x for x, keep in zip(ids, of_part, strict=True) if keep]
                units = [u for u, keep in zip(units, kept, strict=True) if keep]
        return Chunk(
            np.concatenate(ids) if ids else np.zeros(0, np.int32),
            np.array([len(x) for x in ids], np.int64),
            np.array(counts, np.int64)[kept],
            np.array(flags, np.uint8)[kept],
            np.array(numbers, np.int64)[kept],
            bad,
            units if any(units) else (),
        )

    def _parts(
        self, conversation: Conversation, place: str
    ) -> tuple[list[list[Piece]], int, _Media | None]:
        """Pieces of the parts of a row, its flags, and its media.

        Raises:
            BadRow: the row holds no such sample, or media that cannot be used.
            DataError: it has media, and the run as it stands cannot process any.
        """
        if not isinstance(self.media, Processing):
            if conversation.images or conversation.videos:
                if self.media is not None:
                    raise DataError(f"{place} has images or videos. {self.media.reason}")
                what = "images" if conversation.images else "videos"
                raise BadRow(
                    f"media: the row has {what}, and the model takes text alone here: it has no"
                    " tower, one of a family that is not read (the log names those that are), or"
                    " its folder has no preprocessor_config.json or processor_config.json"
                )
            return *self.kind.parts(conversation, self.template, self.options), None
        marked = text.mark(conversation, self.media, place)
        parts, flag = self.kind.parts(marked.conversation, self.template, self.options)
        if not marked.found:
            return parts, flag, None
        filled, numbers = text.fill(
            parts,
            marked.found,
            self.media,
            branches=self.kind.branches,
            chat=isinstance(self.template, ChatTemplate),
            shortened=not all(m.trained for m in marked.conversation.answers),
        )
        return filled, flag, _Media(marked.found, numbers, self.media)

    def _bad(self, bad: BadRows, place: str, reason: BadRow, hint: str = "") -> None:
        if self.strict:
            raise DataError(bad_row_sentence(self.source.name, place, str(reason), hint)) from None
        bad.add(place, str(reason))

    def _unread(self, c: Conversation) -> Iterable[str]:
        return self.template.unread(c) if isinstance(self.template, ChatTemplate) else c.unread


def run(
    preparer: Preparer,
    rows: Iterable[tuple[str, Raw]],
    workers: int | None,
    batch: int,
    progress: Any = None,
) -> Iterator[Chunk]:
    """The chunks of all rows, in order. With `workers` > 1, that many processes tokenise while this
    one reads and writes.
    """

    def batches() -> Iterator[list[tuple[int, str, Raw]]]:
        numbered = ((i, place, raw) for i, (place, raw) in enumerate(rows))
        while True:
            some = _take(numbered, batch)
            if not some:
                return
            yield some

    if not workers or workers < 2:
        for some in batches():
            yield preparer.chunk(some)
            moved()
            if progress is not None:
                progress.update(len(some))
        return
    # Not more than a few batches ahead of the writer: the data set may be larger than memory.
    room = threading.Semaphore(4 * workers)
    stop = threading.Event()

    def throttled() -> Iterator[list[tuple[int, str, Raw]]]:
        """Runs in the pool's feeding thread, which must not be left waiting when the pool ends."""
        for some in batches():
            while not room.acquire(timeout=0.2):
                if stop.is_set():
                    return
            yield some

    # fork: the tokenizer travels without being written; the children touch no device and no process
    # group.
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, initializer=_set, initargs=(preparer,)) as pool:
        try:
            for chunk, n in pool.imap(_work, throttled()):
                room.release()
                moved()
                yield chunk
                if progress is not None:
                    progress.update(n)
        finally:
            stop.set()


def _take(
    rows: Iterator[tuple[int, str, Raw]], batch: int, size: int = 1 << 20
) -> list[tuple[int, str, Raw]]:
    """Up to `batch` rows, fewer where they are long (about 1 MB of raw lines)."""
    out: list[tuple[int, str, Raw]] = []
    seen = 0
    for row in islice(rows, batch):
        out.append(row)
        seen += _weight(row[2])
        if seen > size:
            break
    return out


def _weight(raw: Raw) -> int:
    if isinstance(raw, bytes):
        return len(raw)
    return (
        sum(len(v) for v in raw.values() if isinstance(v, (str, list)))
        if isinstance(raw, dict)
        else 0
    )


_preparer: Preparer | None = None


def _set(preparer: Preparer) -> None:
    """In a child: one thread for the tokenizer, as there are other children."""
    global _preparer
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _preparer = preparer


def _work(rows: list[tuple[int, str, Raw]]) -> tuple[Chunk, int]:
    assert _preparer is not None
    return _preparer.chunk(rows), len(rows)


def fingerprint(source: DataSource) -> str:
    """A digest of the data set's content: of its files' bytes where it is local, else of its
    name.
    """
    import xxhash

    if source.load_from != "file":
        return (
            f"{source.load_from}:{source.location}:{source.subset}:{source.folder}:{source.split}"
        )
    digest = xxhash.xxh3_128()
    for path in source.files():
        digest.update(path.name.encode())
        with path.open("rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def key(preparer: Preparer, limit: int | None, content: str | None = None) -> str:
    """The name of the store: a digest of all that its content depends on. `content`: in place of
    the `fingerprint` of its source.
    """
    source = dataclasses.asdict(preparer.source)
    for unimportant in (
        "name",
        "location",
        "dataset_dir",
        "load_from",
        "num_samples",
        "split",
        "subset",
        "folder",
    ):
        source.pop(unimportant)
    tokenizer = preparer.tokenizer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, type(tokenizer).__name__]
    template, options = preparer.template, preparer.options
    if getattr(tokenizer, "split_special_tokens", False):
        special.append("split")
    facts = [
        *(FORMAT, preparer.kind.name, content or fingerprint(preparer.source), source, special),
        dataclasses.asdict(template) if isinstance(template, Template) else repr(template),
        *(
            options.text_end,
            options.text_begin,
            options.last_only,
            options.equal_pairs,
            options.questions,
            limit,
        ),
        hashlib.sha256(vocabulary.encode()).hexdigest(),
    ]
    if isinstance(preparer.media, Processing):
        facts.append(preparer.media.facts())
    elif preparer.media is not None:  # no row has media: where it is None, such rows were left out
        facts.append("text alone")
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False, default=str).encode()).hexdigest()[
        :32
    ]
