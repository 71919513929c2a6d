"""Which samples are read, when, and by whom: sets of integers, for any number of groups and any
micro-batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from longfactory.data.row import IGNORE, TokenizedDocument, make_row
from longfactory.errors import DataError
from longfactory.train.loader import (
    MEDIA_WORKERS,
    Collate,
    Endless,
    RowSampler,
    RowStream,
    empty_row,
    end_processes,
    make_loader,
    media_workers,
    skip_first_batches,
)
from longfactory.train.survival.signals import ignore_in_loader


def lists_of_all_groups(
    length: int, batch: int, groups: int, epoch: int = 0, **kwargs: object
) -> list[list[list[int]]]:
    """[group][micro-batch] -> samples."""
    out = []
    for group in range(groups):
        sampler = RowSampler(length, batch, groups=groups, group=group, **kwargs)
        sampler.set_epoch(epoch)
        lists = list(sampler)
        assert len(lists) == len(sampler)
        out.append(lists)
    return out


def steps(lists: list[list[list[int]]], accumulation: int) -> list[set[int]]:
    """The samples of each optimizer step, over all groups."""
    count = len(lists[0])
    return [
        {i for group in lists for micro in group[s : s + accumulation] for i in micro}
        for s in range(0, count, accumulation)
    ]


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(0, 60), batch=st.integers(1, 5), groups=st.integers(1, 5), seed=st.one_of(st.none(), st.integers(0, 9)),
    epoch=st.integers(0, 3), by_length=st.booleans(),
)  # fmt: skip
def test_every_sample_is_read_once_in_an_epoch_and_every_group_gets_as_many_lists(
    length: int, batch: int, groups: int, seed: int | None, epoch: int, by_length: bool
) -> None:
    extra = {"lengths": [(7 * i) % 11 for i in range(length)], "window": 8} if by_length else {}
    lists = lists_of_all_groups(length, batch, groups, epoch, seed=seed, **extra)
    assert sorted(i for group in lists for micro in group for i in micro) == list(range(length))
    assert len({len(group) for group in lists}) == 1
    assert all(len(micro) <= batch for group in lists for micro in group)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("length", [24, 29])
def test_a_step_takes_the_same_samples_however_they_are_spread(
    length: int, seed: int | None
) -> None:
    total, want = 8, None
    for batch, groups in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if batch * groups > total:
            continue
        got = steps(
            lists_of_all_groups(length, batch, groups, seed=seed), total // (batch * groups)
        )
        want = want or got
        assert got == want, (batch, groups)
    assert want is not None and len(want) == -(-length // total)
    order = RowSampler(length, 1, seed=seed).order()
    assert want[0] == set(order[:total])


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int | None, epoch: int) -> list[int]:
        sampler = RowSampler(50, 2, seed=seed)
        sampler.set_epoch(epoch)
        return sampler.order()

    orders = [tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    assert order(1, 2) == order(1, 2)
    assert order(None, 1) == list(range(50))


def test_group_by_length_sorts_windows_of_the_shuffled_order() -> None:
    lengths = [(13 * i) % 37 for i in range(40)]
    shuffled = RowSampler(40, 2, seed=5).order()
    grouped = RowSampler(40, 2, seed=5, lengths=lengths, window=12).order()
    for start in range(0, 40, 12):
        part = grouped[start : start + 12]
        assert sorted(part) == sorted(shuffled[start : start + 12])
        assert [lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True)
    assert grouped != shuffled


def test_drop_last_drops_less_than_one_round() -> None:
    lists = lists_of_all_groups(29, 2, 4, drop_last=True)
    assert [len(group) for group in lists] == [3] * 4
    assert sorted(i for group in lists for micro in group for i in micro) == list(range(24))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 30), batch=st.integers(1, 4), groups=st.integers(1, 4))
def test_a_stream_is_dealt_like_an_indexable_set(length: int, batch: int, groups: int) -> None:
    dealt = [list(RowStream(range(length), batch, groups=groups, group=g)) for g in range(groups)]
    assert dealt == lists_of_all_groups(length, batch, groups)


def test_a_stream_passes_the_epoch_on() -> None:
    class Source(list):
        def set_epoch(self, epoch: int) -> None:
            self[:] = [epoch]

    stream = RowStream(Source(), 1, groups=1, group=0)
    stream.set_epoch(4)
    assert list(stream) == [[4]]


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_a_stream_that_ends_begins_again_in_the_next_epochs_order(batch: int, groups: int) -> None:
    """And a step takes the same samples however they are spread: none is short at the stream's end."""

    class Source(list):
        def set_epoch(self, epoch: int) -> None:
            self[:] = [10 * epoch + i for i in range(7)]

    def dealt(group: int) -> list[list[int]]:
        stream = RowStream(Endless(Source()), batch, groups=groups, group=group)
        stream.set_epoch(2)
        return list(itertools.islice(stream, 16 // (batch * groups)))

    want = [*range(20, 27), *range(30, 37), 40, 41]
    assert steps([dealt(g) for g in range(groups)], 4 // (batch * groups)) == [
        set(want[s : s + 4]) for s in range(0, 16, 4)
    ]
    assert list(Endless([])) == []  # nothing comes of reading it again


def collate(samples: list[int], multiple: int, pad_id: int) -> object:
    return make_row(
        [TokenizedDocument([i + 5] * (i + 1), [i + 5] * (i + 1), sample=i) for i in samples]
    ).padded(multiple, pad_id)


def test_no_samples_make_a_row_that_trains_nothing() -> None:
    rows = Collate(collate, 8, 3, empty_row)
    row = rows([])["row"]
    assert len(row) == 8 and row.trained_tokens == 0 and row.real_tokens == 0
    assert row.input_ids.tolist() == [3] * 8 and (row.labels == IGNORE).all()
    assert [d.role for d in row.documents] == ["pad"]
    assert len(rows([0, 2])["row"]) == 8 and rows([0, 2])["row"].real_tokens == 4


def test_a_reference_cache_made_after_the_loader_is_used() -> None:
    class Cache:
        def attach(self, row: object) -> str:
            return "attached"

    caches: list[Cache] = []
    rows = Collate(collate, 8, 3, empty_row)
    common = {"batch": 1, "groups": 1, "group": 0, "workers": 0, "pin": False, "prefetch": None}
    reference = lambda: caches[0] if caches else None  # noqa: E731
    loader = make_loader([1], RowSampler(1, 1), rows, **common, reference=reference)
    assert [item["row"] for item in loader] != ["attached"]
    caches.append(Cache())
    assert [item["row"] for item in loader] == ["attached"]


def test_an_epoch_that_goes_on_has_its_references_and_stops_at_a_row_that_is_wrong() -> None:
    """transformers continues an epoch with a loader of accelerate's own class."""

    class Numbers:
        def attach(self, row: object) -> str:
            return "attached"

    def wrong(row: object) -> object:
        raise DataError("the image of row 3 is cut off")

    common = {"batch": 1, "groups": 1, "group": 0, "workers": 0, "pin": False, "prefetch": None}
    rows = Collate(collate, 8, 3, empty_row)
    loader = make_loader([1, 2, 3], RowSampler(3, 1), rows, **common, reference=Numbers)
    rest = skip_first_batches(loader, 2)
    assert [item["row"] for item in rest] == ["attached"]
    with_image = lambda *args: dataclasses.replace(collate(*args), media=(object(),))  # noqa: E731
    rows = Collate(with_image, 8, 3, empty_row, wrong)  # type: ignore[arg-type]
    loader = make_loader([1, 2, 3], RowSampler(3, 1), rows, **common)
    with pytest.raises(DataError, match="the image of row 3"):
        list(skip_first_batches(loader, 2))


@pytest.mark.processes
def test_processes_of_an_epoch_that_goes_on_are_ended() -> None:
    common = {"batch": 1, "groups": 1, "group": 0, "workers": 1, "pin": False, "prefetch": None}
    rows = Collate(collate, 8, 3, empty_row)
    loader = make_loader(list(range(7)), RowSampler(7, 1), rows, **common)
    others = multiprocessing.active_children()
    batches = iter(skip_first_batches(loader, 2))
    assert next(d.sample for d in next(batches)["row"].documents) == 2
    (process,) = (p for p in multiprocessing.active_children() if p not in others)
    end_processes()
    process.join(20)
    assert not process.is_alive()


def test_what_a_loader_sends_to_its_processes_is_data_alone() -> None:
    """Where processes do not start as copies of this one (Python 3.14's way on Linux), all of it is
    pickled: a function of the run's own would fail, and a model would go with it.
    """

    class Reference:
        def __reduce__(self) -> Any:
            raise AssertionError("what computes the reference is sent")

        def numbers(self) -> None:
            return None

    common = {"batch": 1, "groups": 1, "group": 0, "workers": 0, "pin": False, "prefetch": None}
    given = Collate(collate, 8, 3, empty_row)
    loader = make_loader([1], RowSampler(1, 1), given, **common, reference=Reference().numbers)
    (expected,) = loader
    sent = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, ignore_in_loader)))
    assert torch.equal(sent[1](sent[0])["row"].input_ids, expected["row"].input_ids)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_the_loader_gives_rows(stream: bool, workers: int) -> None:
    data = Stream() if stream else list(range(7))
    common = {
        "batch": 2,
        "groups": 2,
        "group": 1,
        "workers": workers,
        "pin": False,
        "prefetch": None,
    }
    sampler = None if stream else RowSampler(7, 2, groups=2, group=1)
    loader = make_loader(data, sampler, Collate(collate, 4, 0, empty_row), **common)
    rows = [item["row"] for item in loader]
    assert [[d.sample for d in row.documents if d.role != "pad"] for row in rows] == [[2, 3], [6]]
    assert all(len(row) % 4 == 0 and isinstance(row.input_ids, torch.Tensor) for row in rows)


def test_dropping_the_last_step_does_not_depend_on_the_split() -> None:
    def taken(batch: int, groups: int) -> set[int]:
        samplers = [
            RowSampler(23, batch, groups=groups, group=g, seed=1, drop_last=True, step=8)
            for g in range(groups)
        ]
        return {i for s in samplers for indices in s for i in indices}

    assert taken(1, 2) == taken(4, 2) == taken(2, 1) == taken(1, 1)
    assert len(taken(1, 1)) == 16


@pytest.mark.parametrize(
    ("cores", "room", "pixels", "ranks", "expected"),
    [
        (32, 256.0, 1.6, 2, MEDIA_WORKERS),
        (4, 256.0, 1.6, 2, 1),
        (2, 256.0, 1.6, 2, 0),
        (32, 0.0625, 1.6, 2, 0),  # a container's usual /dev/shm
        (32, 16.0, 1.6, 2, 1),
        (32, 0.0625, 0.001, 2, MEDIA_WORKERS),
    ],
)
def test_vision_loader_processes_by_cores_and_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    room: float,
    pixels: float,
    ranks: int,
    expected: int,
) -> None:
    """`room` and `pixels` in GiB."""
    usage = shutil._ntuple_diskusage(2**40, 0, int(room * 2**30))  # type: ignore[attr-defined]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert media_workers(pixels * 2**30, ranks) == expected


class Told:
    """Samples that tell when they are read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, [threading.Event() for _ in range(length)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.read[index].set()
        if index == 3:
            raise DataError("Sample 3 is broken.")
        return index


def made_rows(samples: Told, **kwargs: Any) -> Any:
    """A loader of rows of one sample each."""

    def collate(given: list[int], multiple: int, pad_id: int) -> Any:
        return make_row([TokenizedDocument([i, i], [i, i], sample=i) for i in given])

    sampler = RowSampler(len(samples), 1)
    made = Collate(collate, 2, 0, empty_row)
    given = {"batch": 1, "groups": 1, "group": 0, "workers": 0, "pin": False, "prefetch": None}
    return make_loader(samples, sampler, made, **{**given, **kwargs})


def test_the_next_row_is_made_while_one_is_trained_on_and_none_after_it() -> None:
    samples = Told(3)
    rows = iter(made_rows(samples))
    next(rows)
    assert samples.read[1].wait(20)
    assert not samples.read[2].is_set()
    assert [int(b["row"].input_ids[0]) for b in rows] == [1, 2]
    assert not any(t.name.startswith("rows") for t in threading.enumerate())


def test_what_fails_in_the_thread_that_makes_rows_is_raised_where_they_are_read() -> None:
    rows = iter(made_rows(Told(5)))
    assert [int(next(rows)["row"].input_ids[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="Sample 3 is broken"):
        next(rows)


def test_the_thread_that_makes_rows_ends_with_the_last_row_that_is_asked_for() -> None:
    rows = iter(made_rows(Told(3)))
    next(rows)
    assert any(t.name.startswith("rows") for t in threading.enumerate())
    rows.close()
    assert not any(t.name.startswith("rows") for t in threading.enumerate())
