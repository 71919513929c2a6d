"""What the host does for a row runs on one thread; what comes after it on as many as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from longfactory.sp.threads import one_thread
from longfactory.train.loader import RowLoader


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_is_put_back_also_after_an_error() -> None:
    with pytest.raises(ValueError), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_made_on_one_thread(ahead: bool) -> None:
    def collate(samples: list[int]) -> int:
        return torch.get_num_threads()

    loader = RowLoader(
        [1, 2], collate_fn=collate, batch_size=1, reference=lambda: None, ahead=ahead
    )
    found = []
    for threads in loader:
        found.append((threads, torch.get_num_threads()))
    assert found == [(1, 2), (1, 2)]


def test_threads_that_begin_after_the_one_that_makes_rows_compute_on_as_many_as_before() -> None:
    def collate(samples: list[int]) -> int:
        return len(samples)

    found = []
    for _ in RowLoader([1], collate_fn=collate, batch_size=1, reference=lambda: None, ahead=True):
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert found == [2]
