"""Packing: documents into bins of one capacity, over the whole data set, the same for any number of
workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_WORD = 1024  # bits of one word of the bitmap


@dataclasses.dataclass(frozen=True)
class Packed:
    """`bins[b]` are the indices of the documents of bin b, in data order; bins stand in the order
    of their first document.
    """

    bins: list[np.ndarray]
    capacity: int
    tokens: int

    @property
    def efficiency(self) -> float:
        """Share of the bins' room that holds tokens, 0 to 1."""
        return self.tokens / (len(self.bins) * self.capacity) if self.bins else 0.0


class _Rooms:
    """A set of room sizes 1..capacity that answers "the smallest room of at least n": a bitmap of
    two levels, so that a query costs a few operations on small integers whatever the capacity."""

    def __init__(self, capacity: int):
        self.words = [0] * (capacity // _WORD + 1)
        self.used = 0

    def add(self, room: int) -> None:
        w, bit = divmod(room, _WORD)
        self.words[w] |= 1 << bit
        self.used |= 1 << w

    def remove(self, room: int) -> None:
        w, bit = divmod(room, _WORD)
        self.words[w] &= ~(1 << bit)
        if not self.words[w]:
            self.used &= ~(1 << w)

    def at_least(self, n: int) -> int:
        """The smallest room >= n, or -1."""
        w, bit = divmod(n, _WORD)
        here = self.words[w] >> bit
        if here:
            return n + (here & -here).bit_length() - 1
        above = self.used >> (w + 1)
        if not above:
            return -1
        w += (above & -above).bit_length()
        return w * _WORD + (self.words[w] & -self.words[w]).bit_length() - 1


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packed:
    """Best-fit decreasing: the longest document first, each into the fullest bin that still has
    room for it.

    Ties go to the earlier document and the earlier bin, so the result depends on the lengths alone.
    Cost: n log n.

    Raises:
        ValueError: a document is longer than the capacity, or has no tokens.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        i = int(lengths.argmax())
        raise ValueError(
            f"Document {i} has {lengths[i]} tokens; a packed row has room for {capacity}. Cut or"
            " split it before packing."
        )
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"Document {int(lengths.argmin())} has no tokens.")
    bins: list[list[int]] = []
    rooms = _Rooms(capacity)
    with_room: dict[int, list[int]] = {}  # room -> bins, as a queue (first in, first out)
    heads: dict[int, int] = {}
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        room = rooms.at_least(n)
        if room < 0:
            b = len(bins)
            bins.append([i])
            left = capacity - n
        else:
            queue = with_room[room]
            b = queue[heads[room]]
            heads[room] += 1
            if heads[room] == len(queue):
                rooms.remove(room)
                queue.clear()
                heads[room] = 0
            bins[b].append(i)
            left = room - n
        if left:
            if not with_room.setdefault(left, []):
                heads[left] = 0
                rooms.add(left)
            with_room[left].append(b)
    out = sorted((np.array(sorted(b), dtype=np.int64) for b in bins), key=lambda b: int(b[0]))
    return Packed(out, capacity, int(lengths.sum()))
