"""Which images and videos a document keeps once its sample is cut, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from longfactory.data.media.units import MediaUnit
from longfactory.data.row import TokenizedDocument

Parts = list[list[np.ndarray]]  # of each sample


class MediaCut(Exception):
    """A document would hold a part of an image or a video."""


def with_media(
    documents: Sequence[TokenizedDocument],
    parts: Parts,
    media: Sequence[Sequence[MediaUnit]],
    assemble: Callable[[Parts], list[TokenizedDocument]],
) -> list[TokenizedDocument]:
    """The documents with the media that they hold.

    The parts are assembled once more with numbers in place of their tokens: what is cut, moved and
    repeated is then read from the numbers, whatever the rules are.

    Args:
        documents: made by `assemble` of `parts`.
        parts: of each sample.
        media: of each sample, spans from the first token of their part.
        assemble: makes documents of parts.
    Raises:
        MediaCut: a unit is there in part.
    """
    starts: list[list[int]] = []
    numbered: Parts = []
    at = 0
    for sample in parts:
        starts.append([])
        numbered.append([])
        for part in sample:
            starts[-1].append(at)
            # negative, so that tokens which rules add (eos, a thought) are told apart
            numbered[-1].append(-1 - np.arange(at, at + len(part), dtype=np.int64))
            at += len(part)
    units = [unit.shifted(starts[s][unit.part]) for s, own in enumerate(media) for unit in own]
    out = []
    for document, numbers in zip(documents, assemble(numbered), strict=True):
        found = np.asarray(numbers.input_ids)
        places = np.flatnonzero(found < 0)
        own = _held(units, -1 - found[places], places)
        out.append(dataclasses.replace(document, media=own))
    return out


def _held(
    units: Sequence[MediaUnit], numbers: np.ndarray, places: np.ndarray
) -> tuple[MediaUnit, ...]:
    """The units of a document with their places in it. `numbers` are those of its tokens,
    ascending, `places` where these tokens stand.
    """
    held = []
    for unit in units:
        spans = []
        for start, count in unit.spans:
            first, last = np.searchsorted(numbers, (start, start + count)).tolist()
            if first == last:
                continue
            together = places[last - 1] - places[first] == count - 1
            if last - first < count or not together:
                raise MediaCut
            spans.append((int(places[first]), count))
        if spans and len(spans) < len(unit.spans):
            raise MediaCut
        if spans:
            held.append(dataclasses.replace(unit, spans=tuple(spans), part=-1))
    return tuple(sorted(held, key=lambda unit: unit.spans[0]))


def documents_around(
    media: Sequence[tuple[int, int]], total: int, cutoff: int
) -> list[tuple[int, int]] | None:
    """[start, stop) of documents of at most `cutoff` tokens that a text of `total` tokens becomes,
    none of which ends inside one of `media` ([start, stop), ascending); None where one of them is
    longer than a document.
    """
    out = []
    at = 0
    while at < total:
        stop = min(at + cutoff, total)
        inside = next((a for a, b in media if a < stop < b), stop)
        if inside <= at:
            return None
        out.append((at, inside))
        at = inside
    return out
