"""Which samples a data-parallel group reads, and when: integer arithmetic that does not know the
sequence-parallel size.

An optimizer step t takes the samples [t * G, (t + 1) * G) of the epoch's order, G the total batch.
How the G samples are spread over groups and micro-batches does not matter to the gradient, so a run
with another `sequence_parallel_size` and the same G takes the same steps, and a checkpoint resumes
at the exact sample. Every rank of a sequence-parallel group reads the same samples.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import dataclasses
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import accelerate
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from longfactory.data.media.load import MediaLoading
from longfactory.data.row import Row
from longfactory.data.stream import StreamedDataset
from longfactory.errors import DataError
from longfactory.sp.threads import one_thread
from longfactory.train.reference import Numbers
from longfactory.train.survival.signals import ignore_in_loader


class RowSampler(Sampler[list[int]]):
    """Lists of sample indices, one list for each micro-batch of this data-parallel group.

    Every group gets the same number of lists, as collectives need; at the end of an epoch some
    lists are short or empty (an empty one becomes a row without labels). Nothing is repeated and
    nothing is dropped.

    Args:
        length: number of samples.
        batch: samples in a micro-batch.
        groups, group: number of data-parallel groups and the place of this one.
        seed: of the shuffle; None for the data's own order.
        lengths: token counts; given, samples of like length come together (`group_by_length`), in
            shuffled order.
        window: samples in a stretch that is sorted by length.
        drop_last: leave out the last step of an epoch where it is not whole; `step` is the number
            of samples in one.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        *,
        groups: int = 1,
        group: int = 0,
        seed: int | None = None,
        lengths: Sequence[int] | None = None,
        window: int = 0,
        drop_last: bool = False,
        step: int | None = None,
    ):
        self.length, self.batch, self.groups, self.group = length, batch, groups, group
        self.seed, self.lengths, self.window, self.drop_last = seed, lengths, window, drop_last
        # Samples that the last, incomplete step of an epoch would be short of are dropped by whole
        # steps: the same however rows are sharded.
        self.step = step or batch * groups
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        per_round = self.batch * self.groups
        if self.drop_last:
            return self.length // self.step * self.step // per_round
        return -(-self.length // per_round)

    def order(self) -> list[int]:
        """The epoch's order of samples: a function of seed and epoch alone."""
        if self.seed is None:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.lengths is None or self.window <= 1:
            return order
        lengths = self.lengths
        return [
            i
            for s in range(0, self.length, self.window)
            for i in sorted(order[s : s + self.window], key=lambda i: -lengths[i])
        ]

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for j in range(len(self)):
            start = (j * self.groups + self.group) * self.batch
            yield order[start : start + self.batch]


class RowStream(IterableDataset):
    """A stream of samples -> lists of samples for this data-parallel group. Every rank reads the
    whole stream and keeps its turn.
    """

    def __init__(self, source: Any, batch: int, *, groups: int, group: int):
        self.source, self.batch, self.groups, self.group = source, batch, groups, group

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        turn: list[list[Any]] = [[]]
        for sample in self.source:
            if len(turn[-1]) == self.batch:
                turn.append([])
            turn[-1].append(sample)
            if len(turn) == self.groups and len(turn[-1]) == self.batch:
                yield turn[self.group]
                turn = [[]]
        if turn[0]:
            turn += [[] for _ in range(self.groups - len(turn))]
            yield turn[self.group]


class Endless(IterableDataset):
    """A stream that begins again where it ends, in the order of the next epoch.

    To the Trainer it is one epoch, in which step t takes the items [t * G, (t + 1) * G), G the
    total batch. Of a stream that ended it would add the last micro-batches, too few for a step, to
    the next epoch's first step, and resume a later epoch at its beginning.
    """

    def __init__(self, source: Any):
        self.source, self.epoch = source, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        found, epoch = True, self.epoch
        while found:
            found = False
            if hasattr(self.source, "set_epoch"):
                self.source.set_epoch(epoch)
            for item in self.source:
                found = True
                yield item
            epoch += 1


class Collate:
    """Samples -> {"row": Row}, in a worker process. No samples give a row that trains nothing.

    `reference`: the reference's log-probabilities, which are attached to the documents, or None;
    `RowLoader` sets it when it begins. `media` decodes the images and videos that this rank is
    dealt. What is wrong with them comes back in place of the row (`RowLoader` raises it): raised in
    a worker process it would come with a stack trace.
    """

    def __init__(
        self,
        collate: Callable[[list[Any], int, int], Row],
        multiple: int,
        pad_id: int,
        empty: Callable[[int, int], Row],
        media: MediaLoading | None = None,
    ):
        self.collate, self.multiple, self.pad_id, self.empty = collate, multiple, pad_id, empty
        self.media = media
        self.reference: Numbers | None = None

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """The row, and how many samples it holds."""
        if not samples:
            return {"row": self.empty(self.multiple, self.pad_id), "samples": 0}
        row = self.collate(samples, self.multiple, self.pad_id)
        if row.media:
            if self.media is None:
                return {
                    "problem": "The data have images or videos, which this run cannot train on."
                }
            try:
                row = self.media(row)
            except DataError as error:
                return {"problem": str(error)}
        if self.reference is not None:
            row = self.reference.attach(row)
        return {"row": row, "samples": len(samples)}


def empty_row(multiple: int, pad_id: int) -> Row:
    """A row of padding alone: it takes part in every collective and changes nothing."""
    from longfactory.data.row import IGNORE, Document

    return Row(
        input_ids=torch.full((multiple,), pad_id),
        labels=torch.full((multiple,), IGNORE),
        position_ids=torch.arange(multiple),
        document_ids=torch.zeros(multiple, dtype=torch.int64),
        documents=(Document(0, multiple, role="pad"),),
    )


_with_processes: weakref.WeakSet[Any] = weakref.WeakSet()
"""Iterators of loaders that have processes of their own."""


def end_processes() -> None:
    """Ends the processes of all loaders. They ignore SIGTERM (`ignore_in_loader`), with which
    Python would end them when this one ends, and would then wait for them for ever.
    """
    for batches in list(_with_processes):
        batches._shutdown_workers()


atexit.register(end_processes)


def no_reference() -> None:
    """Of a run that has none."""


class RowLoader(DataLoader):
    """A DataLoader of rows.

    Args:
        reference: the numbers that `Collate` attaches. Called whenever the loader begins, in this
            process: they may be made after the loader is, and what computes them (a model) is not
            sent to the loader's processes, however these start.
        ahead: a thread makes the next row while this one is trained on.
    Raises:
        DataError: while it is iterated: images or videos of a row cannot be decoded.
    """

    def __init__(
        self,
        *args: Any,
        reference: Callable[[], Numbers | None],
        ahead: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reference, self.ahead = reference, ahead

    def __iter__(self) -> Any:
        return self.rows(super().__iter__)

    def rows(self, begin: Callable[[], Any]) -> Any:
        """What `begin` gives, batch by batch: iterators of this loader, or of one that begins later
        in the epoch.
        """
        self.collate_fn.reference = self.reference()
        batches = begin()
        if self.num_workers:
            _with_processes.add(batches)
        for batch in made_ahead(batches) if self.ahead else made_when_asked(batches):
            if isinstance(batch, dict) and "problem" in batch:
                raise DataError(batch["problem"])
            yield batch


def made_when_asked(batches: Iterator[Any]) -> Iterator[Any]:
    """Each batch while the caller waits."""
    while True:
        with one_thread():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def made_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Each batch in a thread of its own, while the caller works on the one before it. A GPU that
    has done its step would wait for all that the host does between two steps.
    """
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    threads = torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(1, "rows") as maker:
        maker.submit(_begin_making, gpu).result()
        # The number belongs to a thread, but threads that begin later take the last one given.
        torch.set_num_threads(threads)
        coming = maker.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = maker.submit(next, batches, None)
            yield batch


def _begin_making(gpu: int | None) -> None:
    """In the thread that makes rows."""
    # A thread's first question or operation takes the number last given in any thread.
    torch.get_num_threads()
    torch.set_num_threads(1)
    if gpu is not None:
        # Memory is pinned by a thread's own GPU, which would be the first one.
        torch.cuda.set_device(gpu)


class _Rest:
    """A `RowLoader` from some batch on. accelerate makes a loader of its own class for that, which
    knows nothing of references, of images that cannot be decoded, and of `end_processes`.
    """

    def __init__(self, loader: RowLoader, rest: DataLoader) -> None:
        self.loader, self.rest = loader, rest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rest, name)

    def __len__(self) -> int:
        return len(self.rest)

    def __iter__(self) -> Any:
        return self.loader.rows(self.rest.__iter__)


def skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
    """accelerate's function of this name, with which transformers resumes within an epoch."""
    rest = accelerate.skip_first_batches(loader, num_batches)
    return _Rest(loader, rest) if isinstance(loader, RowLoader) else rest


MEDIA_WORKERS = 2
"""Loader processes of a rank whose rows have images, where nothing else is asked for: one row is
made while another waits, and a row's own frames are decoded by several threads.
"""


def media_workers(row_bytes: float, ranks: int) -> int:
    """Loader processes of each rank that decode images beside the training, where
    `dataloader_num_workers` is not given: as many as this machine has cores and shared memory for.

    Args:
        row_bytes: pixels of a rank's part of the longest row.
        ranks: on this machine.
    """
    cores = len(os.sched_getaffinity(0)) // ranks
    try:
        room = shutil.disk_usage("/dev/shm").free / ranks
    except OSError:
        return 0
    # Of each process a row that is on its way and the next one, and as much again for other uses.
    rows = int(room // (4 * max(row_bytes, 1.0)))
    return max(0, min(MEDIA_WORKERS, cores // 2, rows))


def make_loader(
    dataset: Any,
    sampler: RowSampler | None,
    collate: Collate,
    *,
    batch: int,
    groups: int,
    group: int,
    workers: int,
    pin: bool,
    prefetch: int | None,
    endless: bool = False,
    reference: Callable[[], Numbers | None] = no_reference,
) -> DataLoader:
    """A plain DataLoader: indexable data sets go by `sampler`, streams take turns; with `endless`
    they begin again where they end. `reference`: see `RowLoader`.

    A `StreamedDataset` uses `workers` by itself: processes of a DataLoader would each read and
    tokenise the whole stream. Without workers, rows of text are made ahead; those of a stream are
    not, as its next sample may be long in coming, and the end of the run would wait for it; those
    of images neither, as a row of pixels more would be held.
    """
    if isinstance(dataset, StreamedDataset):
        dataset, workers = dataclasses.replace(dataset, workers=workers, prefetch=prefetch or 2), 0
    common: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "collate_fn": collate}
    common["reference"] = reference
    if workers:
        common.update(
            persistent_workers=True,
            prefetch_factor=prefetch or 2,
            worker_init_fn=ignore_in_loader,
        )
    if sampler is None:
        return RowLoader(
            RowStream(Endless(dataset) if endless else dataset, batch, groups=groups, group=group),
            batch_size=None,
            **common,
        )
    ahead = not workers and collate.media is None
    return RowLoader(dataset, batch_sampler=sampler, ahead=ahead, **common)
