"""The rows that are verified: which samples of the data they hold, and whether a row that the
trainer made holds what its documents do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from longfactory import sp
from longfactory.data.row import IGNORE, Row, TokenizedDocument
from longfactory.errors import UserError
from longfactory.sp import hf
from longfactory.train.trainer import RowTrainer
from longfactory.train.verify import alone
from longfactory.train.verify.alone import Item, Text
from longfactory.train.verify.report import RowShape

IMAGE_TOKENS = 1024
"""By how many tokens a shortened document may be longer, so that it keeps an image."""


def truncate(
    samples: Sequence[Sequence[TokenizedDocument]], tokens: int
) -> list[list[TokenizedDocument]]:
    """Samples of at most about `tokens` tokens together: each document keeps its last ones, in
    proportion to its length, at least two.
    """
    total = sum(len(d.input_ids) for s in samples for d in s)
    if total <= tokens:
        return [list(s) for s in samples]

    def cut(d: TokenizedDocument) -> TokenizedDocument:
        return last_tokens(d, max(2, len(d.input_ids) * tokens // total))

    return [[cut(d) for d in s] for s in samples]


def last_tokens(document: TokenizedDocument, keep: int) -> TokenizedDocument:
    """A document's last `keep` tokens, or fewer: it does not begin inside an image. Its last image
    stays in it where that takes at most `IMAGE_TOKENS` more; where nothing but an image is left the
    document stays whole.
    """
    length = len(document.input_ids)
    start = max(0, length - keep)
    if document.media and 0 < start - document.media[-1].spans[0][0] <= IMAGE_TOKENS:
        start = document.media[-1].spans[0][0]
    for unit in document.media:
        end = sum(unit.spans[-1])
        if unit.spans[0][0] < start < end:
            start = end
    if length - start < 2:
        return document
    media = tuple(u.shifted(-start) for u in document.media if u.spans[0][0] >= start)
    return dataclasses.replace(
        document,
        input_ids=document.input_ids[start:],
        labels=document.labels[start:],
        media=media,
    )


class Chosen(torch.utils.data.Dataset):
    """The entries of the data set that are compared, in the order in which a loader that does not
    shuffle deals them.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.lengths = [sum(len(d.input_ids) for d in item) for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Item:
        return self.items[i]


def choose(
    dataset: Any, rows: int, batch: int, tokens: int, apart: bool = False
) -> list[list[Item]]:
    """`rows` lists of `batch` entries that train something; from the first again where there are
    fewer. If no row has two documents of different samples, the last one gets them.

    Args:
        apart: one sample a row, also of packed blocks.

    Raises:
        UserError: there is none.
    """
    found: list[list[Item]] = []
    samples: list[Item] = []
    for sample in (
        entries_of(dataset) if not apart else (s for e in entries_of(dataset) for s in parted(e))
    ):
        samples.append(sample)
        if len(samples) < batch:
            continue
        cut: list[Item] = list(truncate(samples, tokens))
        samples = []
        if any(text.places for item in cut for text in alone.texts_of(item)):
            found.append(cut)
        if len(found) == rows:
            break
    if samples and not found:  # fewer samples than a row takes
        copies = [
            _renumbered(item, len(samples) * copy) for copy in range(batch) for item in samples
        ]
        found.append(list(truncate(copies[:batch], tokens)))
    if not found or not any(text.places for item in found[0] for text in alone.texts_of(item)):
        raise UserError(
            f"No row of the training data trains a token among the last {tokens} of its documents:"
            " nothing can be compared."
        )
    found = [found[i % len(found)] for i in range(rows)]
    if (
        batch == 1
        and not apart
        and hasattr(dataset, "__len__")
        and all(len({d.sample for d in row[0]}) < 2 for row in found)
    ):
        own = {d.sample for d in found[-1][0]}
        other = next(
            (dataset[i] for i in range(len(dataset)) if not own & {d.sample for d in dataset[i]}),
            None,
        )
        if other is not None:
            found[-1] = [_merged(truncate([found[-1][0], other], tokens))]
    return found


def entries_of(dataset: Any) -> Iterator[Item]:
    """The entries of a data set, or of a stream."""
    if not hasattr(dataset, "__len__"):
        yield from dataset
        return
    for i in range(len(dataset)):
        yield dataset[i]


def parted(item: Item) -> list[Item]:
    """The samples of a packed block."""
    samples: dict[int, list[TokenizedDocument]] = {}
    places: dict[int, int] = {}
    for i, d in enumerate(item):
        mine = samples.setdefault(d.sample, [])
        places[i] = len(mine)
        mine.append(dataclasses.replace(d, parent=places[d.parent]) if d.parent >= 0 else d)
    return list(samples.values())


def _renumbered(item: Item, further: int) -> Item:
    return [
        dataclasses.replace(d, sample=d.sample + 1_000_000_000 * bool(further) + further)
        for d in item
    ]


def _merged(items: Sequence[Item]) -> Item:
    """The documents of several entries as one entry."""
    out: list[TokenizedDocument] = []
    for item in items:
        first = len(out)
        out += [
            dataclasses.replace(d, parent=d.parent + first) if d.parent >= 0 else d for d in item
        ]
    return out


def crossed(items: list[Item], trainer: RowTrainer) -> None:
    """Shortens the first document of a row until several ranks hold a part of some document."""
    ctx, document = trainer.ctx, items[0][0]
    for quarters in (4, 3, 2, 1):
        keep = max(2, len(document.input_ids) * quarters // 4)
        first = last_tokens(document, keep)
        tried = [[first, *items[0][1:]], *items[1:]]
        row = trainer.collate([list(item) for item in tried], sp.alignment(ctx), trainer.pad_id)
        if ctx.size == 1 or row_shape(row, ctx).crossing:
            items[:] = tried
            return


def padded(items: list[Item], trainer: RowTrainer) -> None:
    """Takes the first token of a row's longest document away where the row has no padding and its
    length must be a multiple of some number: padding is a document that is never trained.
    """
    multiple = sp.alignment(trainer.ctx)
    if multiple == 1 or sum(len(d.input_ids) for item in items for d in item) % multiple:
        return
    i, k = max(
        ((i, k) for i, item in enumerate(items) for k in range(len(item))),
        key=lambda place: len(items[place[0]][place[1]].input_ids),
    )
    longest = items[i][k]
    if len(longest.input_ids) < 3 or longest.parent >= 0:
        return
    shorter = last_tokens(longest, len(longest.input_ids) - 1)
    items[i] = [*items[i][:k], shorter, *items[i][k + 1 :]]


def windows_of(config: Any) -> dict[str, int]:
    """Sizes beyond which a layer of the model sees no key, by the key of the configuration; the
    largest where layers differ.
    """
    types = getattr(config, "layer_types", None) or ()
    found = {}
    for key, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        given = hf.values_of_layers(config, key)
        sizes = [size for size in given if isinstance(size, int) and size > 0]
        used = not types or any(kind in str(each) for each in types)
        if sizes and used:
            found[key] = max(sizes)
    return found


def exercises(texts: Sequence[Text], size: int) -> bool:
    """Whether a token is to be predicted from further back than a window of `size` tokens."""
    return any(text.places[-1] > size for text in texts if text.places)


def lengthened(item: Item, size: int, dataset: Any) -> Item:
    """An item whose documents have so many tokens of other samples in front, none of them trained,
    that the last token that is trained lies beyond a window of `size` tokens by a quarter.
    """
    wanted = size + size // 4 + 16
    texts = [text for text in alone.texts_of(item) if text.places]
    short = wanted - min(text.places[-1] for text in texts)
    if short <= 0:
        return item
    filler: list[int] = []
    for entry in entries_of(dataset):
        filler += [int(token) for d in entry if not d.media for token in d.input_ids]
        if len(filler) >= short:
            break
    if not filler:  # every sample has images
        return item
    filler = (filler * -(-short // len(filler)))[:short]

    def longer(d: TokenizedDocument) -> TokenizedDocument:
        if d.parent >= 0:  # it begins where its parent ends
            return d
        labels = [IGNORE] * short + [int(label) for label in d.labels]
        return dataclasses.replace(
            d,
            input_ids=filler + [int(token) for token in d.input_ids],
            labels=labels,
            media=tuple(unit.shifted(short) for unit in d.media),
        )

    return [longer(d) for d in item]


def row_shape(row: Row, ctx: sp.SequenceParallel) -> RowShape:
    """How large a row is, and which of its tokens each rank holds."""
    documents = [d for d in row.documents if d.role != "pad"]
    layout = sp.plan(len(row), row.segments, ctx).layout
    holders = [
        sum(any(a < d.stop and d.start < b for a, b in intervals) for intervals in layout.intervals)
        for d in documents
    ]
    return RowShape(
        row.real_tokens,
        len(documents),
        sum(n > 1 for n in holders),
        len(row) - row.real_tokens,
        tuple((d.start, d.stop, d.parent, d.role, d.sample) for d in documents),
        layout.intervals,
    )


def row_reason(row: Row, texts: Sequence[Text], number: int) -> str | None:
    """What a row holds that its documents do not, or None."""
    documents = [d for d in row.documents if d.role != "pad"]
    if len(documents) != len(texts):
        return f"Row {number} has {len(documents)} documents, its samples have {len(texts)}."
    for k, (d, text) in enumerate(zip(documents, texts, strict=True)):
        place, here = f"document {k + 1} of row {number}", slice(d.start, d.stop)
        own = range(text.before, len(text.tokens))
        for what, found, expected in (
            ("token", row.input_ids[here].tolist(), list(text.tokens[text.before :])),
            ("position", row.position_ids[here].tolist(), list(own)),
            ("label", row.labels[here].tolist(), list(text.targets[text.before :])),
        ):
            if len(found) != len(expected):
                return (
                    f"{place.capitalize()} has {len(found)} tokens; the data have {len(expected)}."
                )
            t = next(
                (t for t, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None
            )
            if t is None:
                continue
            more = ""
            if what == "label":
                trained = [sum(label != -100 for label in labels) for labels in (found, expected)]
                more = (
                    f" (the next token that is trained, or -100). {trained[0]} labels are trained,"
                    f" {trained[1]} should be"
                )
                if found[:-1] == expected[1:]:
                    more += (
                        "; every label is that of the token after the next: labels are shifted"
                        " twice"
                    )
            return (
                f"The {what} at token {t + 1} of {place} is {found[t]}; by its document it is"
                f" {expected[t]}{more}."
            )
    return None


def mask_reasons(dataset: Any, documents: Sequence[TokenizedDocument]) -> list[str]:
    """Documents that train tokens of their prompts, by the parts that the data set stores and the
    lengths that they are cut to.
    """
    rules, kind = getattr(dataset, "rules", None), getattr(dataset, "kind", None)
    if rules is None or kind is None or not hasattr(dataset, "stores") or rules.train_on_prompt:
        return []
    reasons = []
    for d in documents:
        if not 0 <= d.sample < len(dataset.entries) or d.role in ("prompt", "kl"):
            continue
        store, i = (int(x) for x in dataset.entries[d.sample][:2])
        lengths = [len(part) for part in dataset.stores[store].parts(i)]
        places = kind.prompt_places(lengths, rules, d.role)
        if places is None or d.parent >= 0:  # a branch begins with one token of the prompt
            continue
        length, prompts = places
        # A document that was shortened for verify has lost its beginning.
        trained = {
            t + length - len(d.labels) for t, label in enumerate(d.labels) if int(label) != -100
        }
        if wrong := trained & prompts:
            reasons.append(
                f"Sample {d.sample} trains {len(wrong)} of the {len(prompts)} tokens of its prompt;"
                " train_on_prompt is not set."
            )
    return list(dict.fromkeys(reasons))[:3]
