"""A tokenised data set: entries of stores, cut, packed, and handed out as samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from longfactory.data.assemble import Rules
from longfactory.data.collate import Sample
from longfactory.data.kind import Kind
from longfactory.data.packing import pack
from longfactory.data.report import Report
from longfactory.data.row import TokenizedDocument
from longfactory.data.store import Store


class TokenizedDataset:
    """Map-style data set of samples, read from memory-mapped stores. Picklable.

    `entries` is [n, 2] (store, sample in it), or [n, 4] where the kind needs more of an entry.
    `lengths` is the number of tokens of each item.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        kind: Kind,
        rules: Rules,
        packed: bool,
        report: Report | None = None,
    ):
        self.stores = list(stores)
        self.kind = kind
        self.rules = rules
        self.report = report or Report()
        self.bins: list[np.ndarray] | None = None
        entries, sizes = kind.fit(self.stores, entries, rules, packed, self.report)
        self.entries = entries
        self.report.samples = len(entries)
        self.report.tokens = int(sizes.sum())
        self._largest = int(sizes.argmax()) if len(sizes) else None
        self.lengths = sizes
        if packed and not kind.final and len(entries):
            done = pack(sizes, rules.cutoff)
            self.bins = done.bins
            self.lengths = np.array([sizes[b].sum() for b in done.bins], dtype=np.int64)
            self.report.packed_rows, self.report.efficiency = len(done.bins), done.efficiency

    def __len__(self) -> int:
        return len(self.lengths)

    def image_patches(self) -> tuple[float, float]:
        """(patches of images and videos for each token, patches that one of them sees): means over
        at most 256 samples, which lie evenly in the data.
        """
        chosen = self.entries[:: max(1, -(-len(self.entries) // 256))]
        tokens = patches = seen = 0
        for store, sample in chosen[:, :2].tolist():
            tokens += sum(self.stores[store].lengths(sample))
            for unit in self.stores[store].media(sample):
                parts, each = unit.grid[0], unit.grid[1] * unit.grid[2]
                patches += parts * each
                seen += parts * each**2
        return patches / max(1, tokens), seen / max(1, patches)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of a data set of {len(self)} items.")
        i %= len(self)
        if self.bins is None:
            return self._sample(i)
        return [d for e in self.bins[i].tolist() for d in self._sample(e)]

    def longest_document(self) -> int:
        """Tokens of the longest document of the largest sample, as it is trained on: with the
        prompt that it shares with another.
        """
        if self._largest is None:
            return 0
        ends: list[int] = []
        for d in self._sample(self._largest):  # a prompt comes before what goes on from it
            ends.append(len(d.input_ids) + (ends[d.parent] if d.parent >= 0 else 0))
        return max(ends, default=0)

    def longest_uncut(self) -> int:
        """The smallest cutoff_len by which no sample is cut: the tokens of the longest one, or of
        the longer of its two answers with their prompt.
        """
        if self.kind.final or not len(self.entries):  # saved as they are
            return int(max(self.lengths, default=0))
        uncut = dataclasses.replace(self.rules, cutoff=2**40, strategy="llamafactory")
        low, high = 0, int(self.kind.lengths(self.stores, self.entries, uncut).before.max())
        if self.kind.name in ("pt", "sft"):  # of one document: it is cut where it is longer
            return high
        while high - low > 1:
            middle = (low + high) // 2
            rules = dataclasses.replace(self.rules, cutoff=middle, strategy="llamafactory")
            found = self.kind.lengths(self.stores, self.entries, rules)
            low, high = (middle, high) if (found.before > found.after).any() else (low, middle)
        return high

    def where(self, sample: int) -> tuple[str, int]:
        """The data set, as a message names it, and the row (from 0) of the sample with a number."""
        store, i = self.stores[int(self.entries[sample, 0])], int(self.entries[sample, 1])
        return f"data set {store.meta['name']!r}", int(store.rows[i])

    def _sample(self, e: int) -> list[TokenizedDocument]:
        return self.kind.documents(self.stores, self.entries[e], self.rules, e)
