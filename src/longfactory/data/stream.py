"""Streaming: samples made while they are read, for data that are not to be tokenised beforehand.

The samples are those of the map-style data set: rows pass in windows through the same tokenising,
cutting and packing. Packing sees one window at a time. Every rank reads the whole stream and keeps
its own items, so all ranks agree on the order without talking. What takes time is tokenising: with
`workers`, that many processes of a rank do it ahead of the reader, each a part of every window.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch.utils.data

from longfactory.data.assemble import Rules
from longfactory.data.collate import Sample
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.errors import BadRows
from longfactory.data.prepare import Preparer
from longfactory.data.readers import Raw
from longfactory.data.report import Report
from longfactory.data.store import Chunk, MemoryStore, Store
from longfactory.errors import DataError

# (source, place, raw row)
Row = tuple[int, str, Raw]
Reader = Callable[[], Iterator[tuple[str, Raw]]]


@dataclasses.dataclass
class StreamedDataset(torch.utils.data.IterableDataset):
    """Iterable data set of samples.

    `skip` rows of the shuffled stream are held out for evaluation. `shard(index, count)` keeps
    every count-th item. `workers` processes tokenise, `prefetch` windows ahead; samples and their
    order do not depend on them. A loader's own worker processes would share the items, each of them
    tokenising all. `set_epoch` changes the order. `describe` shows the first sample in the log.
    """

    preparers: Sequence[Preparer]
    readers: Sequence[Reader]
    rules: Rules
    packed: bool
    window: int
    buffer_size: int
    mix: str = "concat"
    probabilities: Sequence[float] | None = None
    seed: int = 0
    skip: int = 0
    epoch: int = 0
    index: int = 0
    count: int = 1
    workers: int = 0
    prefetch: int = 2
    describe: Callable[[Sample], str] | None = None
    log: logging.Logger = dataclasses.field(
        default_factory=lambda: logging.getLogger("longfactory.data")
    )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def shard(self, index: int, count: int) -> StreamedDataset:
        """The items index, index + count, index + 2 count, ... of this stream."""
        return dataclasses.replace(
            self, index=self.index + index * self.count, count=self.count * count
        )

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        index, count = self.index, self.count
        if worker is not None:
            _one_thread(worker.id)
            index, count = index + worker.id * count, count * worker.num_workers
        number = before = 0
        speaks = worker is None or worker.id == 0
        seen, told = Report(), 0
        for data in self._windows(self._rows(self.skip)):
            seen.add(data.report)
            if speaks and len(data) and self.epoch == 0 and seen.samples >= 2 * told:
                # At first, and whenever twice as much has passed.
                self.log.info(f"training (the stream so far): {seen.describe()}.")
                if not told and self.describe is not None:
                    self.log.info("Training example: " + self.describe(data[0]))
                told = seen.samples
            for i in range(len(data)):
                if number % count == index:
                    # Sample numbers go on from window to window: a row may hold samples of two
                    # windows.
                    yield [dataclasses.replace(d, sample=d.sample + before) for d in data[i]]
                number += 1
            before += data.report.samples
        if number == 0:
            raise DataError(
                "The stream holds no usable row. The warnings above say what is wrong with its"
                " rows."
            )

    def held_out(self, rows: int) -> TokenizedDataset:
        """The first rows of the shuffled stream, as a map-style data set."""
        return self._data(
            [self._tokenise(list(enumerate(islice(self._rows(0, first_order=True), rows))))], set()
        )

    # -- rows --------------------------------------------------------------------------------------

    def _rows(self, skip: int, first_order: bool = False) -> Iterator[Row]:
        rng = np.random.default_rng([self.seed, 0])
        rows = _shuffled(self._mixed(), self.buffer_size, rng)
        for _ in zip(range(skip), rows, strict=False):
            pass
        if first_order or self.epoch == 0:
            yield from rows
        else:
            # The held-out rows are the same in every epoch; the rest is shuffled anew.
            yield from _shuffled(
                rows, self.buffer_size, np.random.default_rng([self.seed, self.epoch])
            )

    def _mixed(self) -> Iterator[Row]:
        if self.mix == "concat" or len(self.readers) == 1:
            for s, reader in enumerate(self.readers):
                for place, raw in reader():
                    yield s, place, raw
            return
        names = [preparer.source.name for preparer in self.preparers]
        yield from interleave(self.readers, names, self.mix, self.probabilities, self.seed)

    # -- windows -----------------------------------------------------------------------------------

    def _windows(self, rows: Iterator[Row]) -> Iterator[TokenizedDataset]:
        count = max(self.workers, 1)

        def parts() -> Iterator[list[tuple[int, Row]]]:
            """Each window in as many parts, the last of which may be empty."""
            while True:
                some = list(enumerate(islice(rows, self.window)))
                if not some:
                    return
                size = -(-len(some) // count)
                yield from (some[i * size : (i + 1) * size] for i in range(count))

        told: set[tuple[str, str]] = set()
        done = map(self._tokenise, parts())
        if self.workers:
            # The parts are read here, once, and are what a worker is asked for, in place of an
            # index.
            done = iter(
                torch.utils.data.DataLoader(
                    _Tokenised(self._tokenise),
                    batch_size=None,
                    sampler=parts(),
                    num_workers=count,
                    prefetch_factor=self.prefetch,
                    collate_fn=_as_it_is,
                    worker_init_fn=_one_thread,
                    # else it would draw from the one that dropout is drawn from
                    generator=torch.Generator(),
                )
            )
        while window := list(islice(done, count)):
            yield self._data(window, told)

    def _tokenise(self, rows: list[tuple[int, Row]]) -> list[Chunk] | DataError:
        """A chunk for each source, or what is wrong with a row where bad rows are errors."""
        try:
            return [
                preparer.chunk([(n, place, raw) for n, (source, place, raw) in rows if source == s])
                for s, preparer in enumerate(self.preparers)
            ]
        except DataError as error:
            return error  # raised in another process it would come with a stack trace

    def _data(
        self, parts: list[list[Chunk] | DataError], told: set[tuple[str, str]]
    ) -> TokenizedDataset:
        """The data set of one window, from the chunks of its parts. `told` holds what was said of
        other windows.
        """
        made: list[list[Chunk]] = []
        for part in parts:
            if isinstance(part, DataError):
                raise part
            made.append(part)
        stores: list[Store] = []
        where: dict[int, tuple[int, int]] = {}
        for s, preparer in enumerate(self.preparers):
            bad = BadRows()
            for chunks in made:
                bad.merge(chunks[s].bad)
                where |= {int(n): (len(stores), i) for i, n in enumerate(chunks[s].rows)}
                stores.append(MemoryStore(chunks[s], preparer.source.name))
            if bad.count:
                self.log.warning(f"Data set {preparer.source.name!r}: {bad.describe()}")
            bad.tell_unread(preparer.source.name, self.log, told)
        entries = np.array([where[n] for n in sorted(where)], dtype=np.int64).reshape(-1, 2)
        return TokenizedDataset(stores, entries, self.preparers[0].kind, self.rules, self.packed)


class _Tokenised(torch.utils.data.Dataset):
    """What `tokenise` makes of the rows that it is asked for."""

    def __init__(self, tokenise: Callable[[list[tuple[int, Row]]], Any]):
        self.tokenise = tokenise

    def __getitem__(self, rows: list[tuple[int, Row]]) -> Any:
        return self.tokenise(rows)


def _one_thread(worker: int) -> None:
    """The tokenizer's threads did not come along into a forked process: it would wait for them for
    ever.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _as_it_is(x: Any) -> Any:
    return x


def interleave(
    readers: Sequence[Reader],
    names: Sequence[str],
    mix: str,
    probabilities: Sequence[float] | None,
    seed: int,
) -> Iterator[Row]:
    """Rows of several readers in the order in which `datasets.interleave_datasets` puts data sets
    whose lengths it knows.

    One row of each reader is read ahead, so that its end is known when its last row is drawn.
    `mix`: interleave_under stops at the first end, interleave_over (an ended reader begins again)
    when all have ended, interleave_once leaves out what has ended. Where the readers take turns,
    the first two stop at the end of a round.

    Raises:
        DataError: a reader without rows.
    """
    streams = [reader() for reader in readers]
    ahead = [next(stream, None) for stream in streams]
    for name, item in zip(names, ahead, strict=True):
        if item is None:
            raise DataError(f"Data set {name!r} has no row, so it cannot be interleaved.")
    ended = np.zeros(len(readers), bool)
    # What is never drawn does not keep the others from ending.
    never = (
        np.zeros(len(readers), bool) if probabilities is None else np.asarray(probabilities) == 0
    )
    for s in _draws(len(readers), probabilities, seed):
        stops = (mix == "interleave_under" and ended.any()) or (ended | never).all()
        if stops and (s == 0 or probabilities is not None or mix == "interleave_once"):
            return
        item = ahead[s]
        if item is None:  # ended, and not begun again
            continue
        yield s, *item
        ahead[s] = next(streams[s], None)
        if ahead[s] is None:
            ended[s] = True
            if mix != "interleave_once":
                streams[s] = readers[s]()
                ahead[s] = next(streams[s], None)


def _draws(count: int, probabilities: Sequence[float] | None, seed: int) -> Iterator[int]:
    """The numbers of the readers, without end: one after the other, or by chance in the blocks in
    which `datasets` draws.
    """
    if probabilities is None:
        yield from cycle(range(count))
    rng = np.random.default_rng(seed)
    while True:
        yield from map(int, rng.choice(count, size=1000, p=probabilities))


def _shuffled(rows: Iterator[Row], size: int, rng: np.random.Generator) -> Iterator[Row]:
    """Rows in a random order, each at most about `size` rows later than it was read. Size 1 keeps
    the order.
    """
    held: list[Row] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
        else:
            i = int(rng.integers(size))
            held[i], row = row, held[i]
            yield row
    if size > 1:
        rng.shuffle(held)  # type: ignore[arg-type]
    yield from held
