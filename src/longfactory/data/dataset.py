"""A tokenised data set: entries of stores, cut, packed, and handed out as samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longfactory.data import assemble
from longfactory.data.assemble import Rules
from longfactory.data.collate import Sample
from longfactory.data.packing import pack
from longfactory.data.row import Role, TokenizedDocument
from longfactory.data.store import (
    DESIRED,
    EQUAL_PAIR,
    LACKS_THOUGHT,
    LAST_ONLY,
    NO_ANSWER,
    SECOND_LACKS_THOUGHT,
    Store,
)
from longfactory.errors import DataError


@dataclasses.dataclass
class Report:
    """What became of the rows. `lost_tokens` are tokens cut away (or dropped with their sample);
    `efficiency` is the share of the packed rows' room that holds tokens. `bad_rows` holds for each
    data set the count, the reasons and the first places."""

    rows_read: int = 0
    bad_rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    dropped: int = 0
    untrained: int = 0
    last_answer_only: int = 0
    equal_pairs: int = 0
    unanswered: int = 0
    packed_rows: int = 0
    efficiency: float | None = None

    @property
    def bad(self) -> int:
        return sum(b["count"] for b in self.bad_rows.values())

    def add(self, other: Report) -> None:
        """Counts another part of the same data too (its samples; packing is that of one part)."""
        for name in (
            "samples",
            "tokens",
            "truncated",
            "lost_tokens",
            "dropped",
            "untrained",
            "last_answer_only",
            "equal_pairs",
            "unanswered",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def describe(self) -> str:
        """One line for the log."""
        text = f"{self.samples} samples, {self.tokens} tokens"
        if self.bad:
            text += f"; {self.bad} of {self.rows_read} rows were bad"
        if self.truncated:
            text += (
                f"; {self.truncated} samples were cut at cutoff_len and lost {self.lost_tokens}"
                " tokens"
            )
        if self.dropped:
            text += (
                f"; {self.dropped} samples longer than cutoff_len were dropped ({self.lost_tokens}"
                " tokens)"
            )
        if self.untrained:
            text += f"; {self.untrained} samples have no trained token left"
        if self.last_answer_only:
            text += f"; in {self.last_answer_only} conversations only the last answer is trained"
        if self.equal_pairs:
            text += f"; in {self.equal_pairs} pairs both answers are the same"
        if self.unanswered:
            text += f"; {self.unanswered} samples have no answer and are for do_predict alone"
        if self.efficiency is not None:
            text += f"; packed into {self.packed_rows} rows, {100 * self.efficiency:.1f} % full"
        return text


class TokenizedDataset:
    """Map-style data set of samples, read from memory-mapped stores. Picklable.

    `entries` is [n, 2] (store, sample in it); for packed pre-training [n, 4] with the range of
    tokens too, for kto [n, 4] with the sample whose answer is borrowed for the KL estimate (the
    entry before). `lengths` is the number of tokens of each item. Kind "made": documents saved with
    their labels, for the stage kind `made`.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        kind: str,
        rules: Rules,
        packed: bool,
        report: Report | None = None,
        made: str = "",
    ):
        self.stores = list(stores)
        self.kind = kind
        self.made = made
        self.rules = rules
        self.report = report or Report()
        self.bins: list[np.ndarray] | None = None
        if kind == "made":
            sizes = self._totals(entries) // 2
            packed = False
        elif kind == "pt" and packed:
            entries = self._split_texts(entries)
            sizes = entries[:, 3] - entries[:, 2]
        else:
            entries, sizes = self._cut(entries)
        self.entries = entries
        self.report.samples = len(entries)
        self.report.tokens = int(sizes.sum())
        self.lengths = sizes
        if packed and len(entries):
            done = pack(sizes, rules.cutoff)
            self.bins = done.bins
            self.lengths = np.array([sizes[b].sum() for b in done.bins], dtype=np.int64)
            self.report.packed_rows, self.report.efficiency = len(done.bins), done.efficiency

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of a data set of {len(self)} items.")
        i %= len(self)
        if self.bins is None:
            return self._sample(i)
        return [d for e in self.bins[i].tolist() for d in self._sample(e)]

    # -- one sample --------------------------------------------------------------------------------

    def _sample(self, e: int) -> list[TokenizedDocument]:
        store, i = self.stores[self.entries[e, 0]], int(self.entries[e, 1])
        parts = store.parts(i)
        flags = int(store.flags[i])
        match self.kind:
            case "pt":
                if self.entries.shape[1] == 4:
                    start, stop = self.entries[e, 2:].tolist()
                    return [assemble.plain(parts[0][start:stop], e)]
                return [
                    assemble.plain(
                        assemble.cut(parts[0], self.rules.cutoff, self.rules, self.rules.prefix), e
                    )
                ]
            case "sft" if flags & NO_ANSWER:
                return [assemble.question(parts[0], self.rules, e)]
            case "sft":
                return [assemble.sft(parts, self.rules, e, bool(flags & LAST_ONLY))]
            case "made":
                return self._made(parts, e, flags)
            case "pair":
                return assemble.pair(
                    parts,
                    self.rules,
                    e,
                    (bool(flags & LACKS_THOUGHT), bool(flags & SECOND_LACKS_THOUGHT)),
                )
            case _:
                s, j = self.entries[e, 2:].tolist()
                other, other_flags = self.stores[s].parts(j)[1], int(self.stores[s].flags[j])
                lacks, other_lacks = bool(flags & LACKS_THOUGHT), bool(other_flags & LACKS_THOUGHT)
                return assemble.kto(
                    parts[0],
                    parts[1],
                    other,
                    self.rules,
                    e,
                    bool(flags & DESIRED),
                    lacks,
                    other_lacks,
                )

    def _made(self, parts: list[np.ndarray], e: int, flags: int) -> list[TokenizedDocument]:
        """Documents that were saved with their labels."""
        roles: list[Role] = ["text"] * (len(parts) // 2)
        if self.made in ("pair", "kto"):
            roles = (
                ["chosen", "rejected"]
                if self.made == "pair"
                else ["chosen" if flags & DESIRED else "rejected", "kl"]
            )
        whole = self.made in ("pair", "kto")
        return [
            TokenizedDocument(
                ids.astype(np.int64),
                labels.astype(np.int64),
                role,
                e if whole else e * 1_000_000 + k,
            )
            for k, (ids, labels, role) in enumerate(
                zip(parts[::2], parts[1::2], roles, strict=True)
            )
        ]

    # -- lengths, cutting --------------------------------------------------------------------------

    def _split_texts(self, entries: np.ndarray) -> np.ndarray:
        """Texts longer than the cutoff become consecutive documents; nothing is lost."""
        totals = self._totals(entries)
        pieces = np.maximum(-(-totals // self.rules.cutoff), 1)
        out = np.repeat(entries, pieces, axis=0)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = (np.arange(len(out)) - first) * self.rules.cutoff
        stop = np.minimum(start + self.rules.cutoff, np.repeat(totals, pieces))
        return np.column_stack([out, start, stop])[stop > start]

    def _totals(self, entries: np.ndarray) -> np.ndarray:
        return self._gather(entries, lambda store, i: store.totals()[i])

    def _cut(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries that stay, and their lengths after truncation. Most samples fit and cost nothing;
        the others are looked at one by one."""
        rules, report = self.rules, self.report
        if self.kind == "kto":
            entries = np.column_stack([entries, np.roll(entries, 1, axis=0)])
        before, after, untrained = self._sizes(entries)
        cut = before > after
        if cut.any() and rules.strategy == "error":
            e = int(np.flatnonzero(cut)[0])
            store, i = self.stores[entries[e, 0]], int(entries[e, 1])
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
            report.untrained = int(untrained[keep].sum())
        for s, store in enumerate(self.stores):
            here = keep & (entries[:, 0] == s)
            flags = store.flags[entries[here, 1]]
            if self.kind == "pair":
                report.equal_pairs += int(((flags & EQUAL_PAIR) > 0).sum())
            else:
                report.last_answer_only += int(((flags & LAST_ONLY) > 0).sum())
                report.unanswered += int(((flags & NO_ANSWER) > 0).sum())
        return entries[keep], after[keep]

    def _sizes(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each entry before and after truncation, and whether it has no trained token
        afterwards.
        """
        rules = self.rules
        untrained = np.zeros(len(entries), bool)
        if self.kind in ("pt", "sft"):
            before = self._totals(entries) + (rules.eos is not None and self.kind == "sft")
            asked = (self._flags(entries) & NO_ANSWER) > 0
            if self.kind == "sft" and asked.any():
                thought = 0 if rules.thought_trained else len(rules.thought)
                before = np.where(asked, before - (rules.eos is not None) + thought, before)
            after = np.minimum(before, rules.cutoff)
            if self.kind == "sft":
                for e in np.flatnonzero((before > rules.cutoff) & ~asked).tolist():
                    lengths = self._lengths(entries[e])
                    kept = assemble.cut_turns(lengths, rules)
                    after[e] = sum(s + t for _, s, t in kept) + (rules.eos is not None)
                    untrained[e] = (
                        not rules.train_on_prompt
                        and rules.eos is None
                        and not any(t for _, _, t in kept)
                    )
            return before, after, untrained
        own, other = entries[:, :2], entries[:, 2:]
        flags = self._flags(own)
        prompt, first = self._part(own, 0), self._part(own, 1)
        second = self._part(own, 2) if self.kind == "pair" else self._part(other, 1)
        lacks = (flags & LACKS_THOUGHT) > 0
        other_lacks = (
            (flags & SECOND_LACKS_THOUGHT) > 0
            if self.kind == "pair"
            else (self._flags(other) & LACKS_THOUGHT) > 0
        )
        shown, trained = (
            (0, len(rules.thought)) if rules.thought_trained else (len(rules.thought), 0)
        )
        end = int(rules.eos is not None)
        first, second = first + end + trained * lacks, second + end + trained * other_lacks
        prompt, other_prompt = prompt + shown * lacks, prompt + shown * other_lacks
        if self.kind == "kto":
            source, target = assemble.cut_pairs(prompt, first, rules.cutoff)
            other_source, other_target = assemble.cut_pairs(other_prompt, second, rules.cutoff)
            # Where both keep the same prompt it stands once in the row, and its last token once
            # more at the head of each branch.
            shared = (
                (prompt == other_prompt)
                & (source == other_source)
                & (source > 1)
                & rules.share_prompt
            )
            before = first + second + np.where(shared, prompt + 1, prompt + other_prompt)
            after = target + other_target + np.where(shared, source + 1, source + other_source)
            return before, after, target == 0
        source, longest = assemble.cut_pairs(prompt, np.maximum(first, second), rules.cutoff)
        chosen, rejected = np.minimum(first, longest), np.minimum(second, longest)

        def of_prompt(n: np.ndarray) -> np.ndarray:
            # A shared prompt stands once in the row, and its last token once more at the head of
            # each branch.
            return np.where(n > 1, n + 1, 2 * n) if rules.share_prompt else 2 * n

        return (
            of_prompt(prompt) + first + second,
            of_prompt(source) + chosen + rejected,
            (chosen == 0) | (rejected == 0),
        )

    def _lengths(self, entry: np.ndarray) -> list[int]:
        return self.stores[entry[0]].lengths(int(entry[1]))

    def _flags(self, entries: np.ndarray) -> np.ndarray:
        return self._gather(entries, lambda store, i: store.flags[i])

    def _part(self, entries: np.ndarray, k: int) -> np.ndarray:
        """[n] lengths of the k-th part of each entry."""
        return self._gather(
            entries,
            lambda store, i: (
                store.part_start[store.first_part[i] + k + 1]
                - store.part_start[store.first_part[i] + k]
            ),
        )

    def _gather(
        self, entries: np.ndarray, of: Callable[[Store, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        out = np.zeros(len(entries), np.int64)
        for s, store in enumerate(self.stores):
            here = entries[:, 0] == s
            out[here] = of(store, entries[here, 1])
        return out
