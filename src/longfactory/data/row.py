"""The row: one flat sequence of tokens made of documents. Everything that is trained on travels as
a row.

A batch of k samples is a row of k documents, a packed block is a row, a preference pair is a row of
two documents (or of a shared prompt and two branches). Letters: T tokens of the row, D documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longfactory.data.media.units import LoadedMedia, MediaUnit
from longfactory.sp.layout import Segment

IGNORE = -100

Role = Literal["text", "prompt", "chosen", "rejected", "kl", "pad"]


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """A document before it is placed in a row. `labels[t]` is `input_ids[t]` where the token is
    trained, else -100 (not shifted).

    `labels` may differ from `input_ids` at a trained token (some templates teach an end token in
    place of the next turn's first token). `parent` is the index, among the documents handed to
    `make_row` together with this one, of the document that this one continues: it sees all of the
    parent, and its positions go on where the parent ends.
    """

    input_ids: Sequence[int] | np.ndarray
    labels: Sequence[int] | np.ndarray
    role: Role = "text"
    sample: int = -1
    parent: int = -1
    reference_logp: float | None = None
    media: tuple[MediaUnit, ...] = ()
    """Its images and videos, whole, in the order of their placeholders."""
    numbers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What is known of each token beside its label, at the token itself (not shifted)."""


@dataclasses.dataclass(frozen=True)
class Document:
    """What is known of the tokens [start, stop) of a row. Documents of one preference pair have the
    same `sample`.
    """

    start: int
    stop: int
    role: Role = "text"
    sample: int = -1
    parent: int = -1
    reference_logp: float | None = None
    trained: int = 0
    """Number of trained tokens: labels that are not -100."""


@dataclasses.dataclass
class Row:
    """`labels[t]` is the token to predict at position t, already shifted inside each document, or
    -100.

    `position_ids` restart in each document (in a branch: after its parent). `document_ids[t]`
    indexes `documents`. Padding is a document of its own, with role "pad", at the end.

    `media` are all images and videos of the row, with spans from the row's first token, in the
    order of their placeholders; the same on every rank. `pixels` are those that this rank was dealt
    and has decoded.
    """

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    document_ids: Tensor  # [T] int64
    documents: tuple[Document, ...]
    media: tuple[MediaUnit, ...] = ()
    pixels: tuple[LoadedMedia, ...] = ()
    numbers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """[T, ...] by name, of the token that is predicted at each position: shifted as `labels` are,
    0 where there is none. Empty but for stages that bring numbers of their own.
    """

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What the attention plan needs to know: the documents as plain intervals."""
        return tuple(Segment(d.start, d.stop, d.parent) for d in self.documents)

    @property
    def trained_tokens(self) -> int:
        """Number of labels that are not -100. Known on the host: no device synchronisation."""
        return sum(d.trained for d in self.documents)

    @property
    def real_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return sum(d.stop - d.start for d in self.documents if d.role != "pad")

    def sequences(self, index: Tensor) -> Tensor:
        """In how many of the row's sequences each token at `index` is, int64: a shared prompt is in
        one for each document that goes on from it, padding in none.
        """
        counts = [0] * len(self.documents)
        for number, document in reversed(list(enumerate(self.documents))):  # branches come later
            if document.role != "pad":
                counts[number] = counts[number] or 1
            if document.parent >= 0:
                counts[document.parent] += counts[number]
        return torch.tensor(counts)[self.document_ids[index]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        move = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        pixels = tuple(m.to(device, non_blocking=non_blocking) for m in self.pixels)
        numbers = {n: x.to(device, non_blocking=non_blocking) for n, x in self.numbers.items()}
        return dataclasses.replace(self, **move, pixels=pixels, numbers=numbers)

    def pin_memory(self) -> Row:
        pin = {
            f.name: getattr(self, f.name).pin_memory()
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        pixels = tuple(m.pin_memory() for m in self.pixels)
        numbers = {name: x.pin_memory() for name, x in self.numbers.items()}
        return dataclasses.replace(self, **pin, pixels=pixels, numbers=numbers)

    def padded(self, multiple: int, pad_id: int) -> Row:
        """The row with a padding document at its end, so that T is a multiple of `multiple`."""
        short = -len(self) % multiple
        if short == 0:
            return self

        def extend(x: Tensor, tail: Tensor) -> Tensor:
            return torch.cat([x, tail.to(x)])

        pad = Document(len(self), len(self) + short, role="pad")
        return dataclasses.replace(
            self,
            input_ids=extend(self.input_ids, torch.full((short,), pad_id)),
            labels=extend(self.labels, torch.full((short,), IGNORE)),
            position_ids=extend(self.position_ids, torch.arange(short)),
            document_ids=extend(self.document_ids, torch.full((short,), len(self.documents))),
            documents=(*self.documents, pad),
            numbers={
                name: extend(x, x.new_zeros(short, *x.shape[1:]))
                for name, x in self.numbers.items()
            },
        )


def shift_labels(labels: Tensor) -> Tensor:
    """Labels of one document moved one to the left; its last token predicts nothing."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORE)])


def make_row(documents: Sequence[TokenizedDocument]) -> Row:
    """Documents laid end to end.

    Raises:
        ValueError: no document, an empty document, labels of another length than the tokens, or a
            parent that does not come first.
    """
    if not documents:
        raise ValueError("A row needs at least one document.")
    ids, labels, positions, indices, placed = [], [], [], [], []
    media: list[MediaUnit] = []
    start = 0
    ends: list[int] = []  # position id that follows each document's last token
    for i, d in enumerate(documents):
        n = len(d.input_ids)
        if n == 0:
            raise ValueError(
                f"Document {i} of sample {d.sample} has no tokens. Drop it before it reaches a row."
            )
        if len(d.labels) != n:
            raise ValueError(
                f"Document {i} of sample {d.sample} has {n} tokens and {len(d.labels)} labels."
            )
        if not -1 <= d.parent < i:
            raise ValueError(
                f"Document {i} names document {d.parent} as its parent; a parent comes before its"
                " branches."
            )
        label = shift_labels(torch.as_tensor(d.labels, dtype=torch.int64))
        first = ends[d.parent] if d.parent >= 0 else 0
        ids.append(torch.as_tensor(d.input_ids, dtype=torch.int64))
        labels.append(label)
        positions.append(torch.arange(first, first + n))
        indices.append(torch.full((n,), i))
        ends.append(first + n)
        media += [unit.shifted(start, i) for unit in d.media]
        placed.append(
            Document(
                start,
                start + n,
                d.role,
                d.sample,
                d.parent,
                d.reference_logp,
                int((label != IGNORE).sum()),
            )
        )
        start += n
    return Row(
        torch.cat(ids),
        torch.cat(labels),
        torch.cat(positions),
        torch.cat(indices),
        tuple(placed),
        tuple(media),
        numbers=_numbers(documents),
    )


def _numbers(documents: Sequence[TokenizedDocument]) -> dict[str, Tensor]:
    """[T, ...] of what documents bring beside labels, shifted as those are; 0 in documents without
    it.
    """
    shapes = {name: (x.shape[1:], x.dtype) for d in documents for name, x in d.numbers.items()}
    out = {}
    for name, (shape, dtype) in shapes.items():
        parts = []
        for i, d in enumerate(documents):
            part = np.zeros((len(d.input_ids), *shape), dtype=dtype)
            if name in d.numbers:
                if len(d.numbers[name]) != len(part):
                    raise ValueError(
                        f"Document {i} of sample {d.sample} has {len(part)} tokens and"
                        f" {len(d.numbers[name])} numbers of {name}."
                    )
                part[:-1] = d.numbers[name][1:]
            parts.append(torch.from_numpy(part))
        out[name] = torch.cat(parts)
    return out
