"""What a kind of samples says: which data sets hold such samples, the parts that are stored of one,
its length once it is cut, and the documents that it becomes; and what is the same for all
(`data.kinds`). The classes have no state and their objects compare by name.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from longfactory.config.data_arguments import DataSettings
from longfactory.data.assemble import Rules
from longfactory.data.formats import Conversation
from longfactory.data.media.documents import MediaCut, Parts, with_media
from longfactory.data.report import Report
from longfactory.data.row import Role, TokenizedDocument
from longfactory.data.sources import DataSource
from longfactory.data.store import (
    EQUAL_PAIR,
    LAST_ONLY,
    NO_ANSWER,
    Store,
    flags_of,
    media_of,
)
from longfactory.data.template import Piece
from longfactory.data.templates import AnyTemplate
from longfactory.errors import DataError


@dataclasses.dataclass(frozen=True)
class PartOptions:
    """What a run's keys change of the parts that are stored.

    `text_begin` and `text_end` surround a text. `last_only`: only the last answer is trained.
    `equal_pairs`: pairs whose answers are the same are kept. `questions`: conversations without a
    last answer are kept.
    """

    text_end: str = ""
    text_begin: str = ""
    last_only: bool = False
    equal_pairs: bool = False
    questions: bool = False


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of n entries: tokens before and after truncation, [n] int64, and whether no trained token is
    left, [n] bool.
    """

    before: np.ndarray
    after: np.ndarray
    untrained: np.ndarray


class Kind(abc.ABC):
    """What a stage's samples are.

    An *entry* says where a sample is stored: [2] int64 (store, sample in it), and for some kinds
    two numbers more.
    """

    name: ClassVar[str]
    """As it is written into token caches and folders of `tokenized_path`."""
    uses_template: ClassVar[bool] = True
    final: ClassVar[bool] = False
    """Whether rows are filled already, so that nothing is packed."""
    ranking: ClassVar[bool] = False
    """Whether `dataset_info.json` must mark the data set as pairs."""
    samples: ClassVar[int] = 1
    """Stored samples that an entry names."""
    branches: ClassVar[bool] = False
    """Whether each part after the first goes on from the first, not from the one before it."""
    saved_prefixes: ClassVar[tuple[str, ...]] = ("",)
    """Of the columns of a data set that LLaMA-Factory tokenised, one for each document."""
    saved_columns: ClassVar[frozenset[str]] = frozenset({"input_ids"})
    """Columns that tell such a data set from those of other kinds."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def check_source(self, source: DataSource, stage: str) -> None:
        """Raises DataError for a data set that another stage needs."""
        if source.ranking != self.ranking:
            need = (
                "needs pairs (ranking: true, with chosen and rejected)"
                if self.ranking
                else "cannot use pairs (ranking: true)"
            )
            raise DataError(
                f"Stage {stage} {need}; the entry of data set {source.name!r} says otherwise."
                + ("" if self.ranking else " Pairs are for stage: dpo and stage: rm.")
            )

    def options(
        self, args: DataSettings, template: AnyTemplate | None, tokenizer: Any, questions: bool
    ) -> PartOptions:
        """What of the run's keys changes the stored parts. `questions`: conversations without a
        last answer are for the model to answer.
        """
        return PartOptions()

    def parts(
        self, conversation: Conversation, template: AnyTemplate, options: PartOptions
    ) -> tuple[list[list[Piece]], int]:
        """The parts that are stored of a row, untokenised, and its flags.

        Raises:
            BadRow: the row holds no such sample.
        """
        raise TypeError(f"Samples of the kind {self.name} are not made from rows.")

    def fit(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        rules: Rules,
        packed: bool,
        report: Report,
    ) -> tuple[np.ndarray, np.ndarray]:
        """([m, 2 or 4] entries that stay, [m] their lengths after truncation) of [n, 2] entries.

        Most samples fit and cost nothing; the others are looked at one by one. What is lost is
        counted in `report`, the data set's `Report`.

        Raises:
            DataError: a sample is too long, and the rules say that this is an error.
        """
        entries = self.borrow(entries)
        lengths = self.lengths(stores, entries, rules)
        before, after = lengths.before, lengths.after
        cut = before > after
        if cut.any() and rules.strategy == "error":
            e = int(np.flatnonzero(cut)[0])
            store, i = stores[entries[e, 0]], int(entries[e, 1])
            raise DataError(
                f"{int(cut.sum())} samples are longer than cutoff_len ({rules.cutoff}), first row"
                f" {int(store.rows[i]) + 1} of data set {store.meta.get('name')!r}. Raise"
                " cutoff_len, or set cutoff_strategy to llamafactory, keep_tail or drop."
            )
        report.lost_tokens = int((before - after)[cut].sum())
        keep = after > 0
        if rules.strategy == "drop":
            report.dropped = int(cut.sum())
            report.lost_tokens = int(before[cut].sum())
            keep &= ~cut
        else:
            report.truncated = int(cut.sum())
            report.untrained = int(lengths.untrained[keep].sum())
        with_media = media_of(stores, entries) & keep
        for e in np.flatnonzero(with_media & (cut | rules.share_prompt)).tolist():
            if not self._whole(stores, entries[e], rules):
                keep[e] = False
                report.media_cut += 1
        report.with_media = int((with_media & keep).sum())
        entries, after = entries[keep], after[keep]
        flags = flags_of(stores, entries)
        report.equal_pairs += int(((flags & EQUAL_PAIR) > 0).sum())
        report.last_answer_only += int(((flags & LAST_ONLY) > 0).sum())
        report.unanswered += int(((flags & NO_ANSWER) > 0).sum())
        return entries, after

    def _whole(self, stores: Sequence[Store], entry: np.ndarray, rules: Rules) -> bool:
        """Whether no image or video is cut in two."""
        try:
            self.documents(stores, entry, rules, 0)
        except MediaCut:
            return False
        return True

    def borrow(self, entries: np.ndarray) -> np.ndarray:
        """Entries with what they need of other samples."""
        return entries

    @abc.abstractmethod
    def lengths(self, stores: Sequence[Store], entries: np.ndarray, rules: Rules) -> Lengths:
        """Tokens of each entry, as many as `documents` makes."""

    def documents(
        self, stores: Sequence[Store], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        """The documents of one entry, cut, with labels, roles, and their images and videos.

        Raises:
            MediaCut: the cut goes through an image or a video (`fit` leaves out such entries).
        """
        places = [(stores[entry[2 * k]], int(entry[2 * k + 1])) for k in range(self.samples)]
        parts = [store.parts(i) for store, i in places]
        flags = [int(store.flags[i]) for store, i in places]
        documents = self.assembled(parts, flags, entry, rules, sample)
        media = [store.media(i) for store, i in places]
        if not any(media):
            return documents
        return with_media(
            documents, parts, media, lambda p: self.assembled(p, flags, entry, rules, sample)
        )

    @abc.abstractmethod
    def assembled(
        self, parts: Parts, flags: Sequence[int], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        """The documents of one entry from the parts and flags of its samples."""

    def saved_flags(self, batch: dict[str, list], i: int) -> int:
        """The flags of row i of a data set that LLaMA-Factory tokenised."""
        return 0

    def saved_documents(
        self, documents: Sequence[tuple[np.ndarray, np.ndarray]], flags: int, sample: int
    ) -> list[TokenizedDocument]:
        """Documents that were saved with their labels: each (ids, labels) is a sample."""
        return [
            saved_document(ids, labels, "text", sample * 1_000_000 + k)
            for k, (ids, labels) in enumerate(documents)
        ]

    def check(
        self, what: str, flags: np.ndarray, report: Report, rules: Rules, log: logging.Logger
    ) -> None:
        """Looks at the whole data set once it is cut.

        Args:
            what: what the data are for: training, or an evaluation.
            flags: [n] of the samples that stayed.
        Raises:
            DataError: nothing can be learnt of them.
        """
        return None

    def prompt_places(
        self, lengths: Sequence[int], rules: Rules, role: str
    ) -> tuple[int, set[int]] | None:
        """(tokens of the document, the places of prompt tokens in it that teach nothing), from the
        lengths of the stored parts; None where lengths do not tell.
        """
        return None


def saved_document(
    ids: np.ndarray, labels: np.ndarray, role: Role, sample: int
) -> TokenizedDocument:
    """A document that LLaMA-Factory tokenised."""
    return TokenizedDocument(ids.astype(np.int64), labels.astype(np.int64), role, sample)
