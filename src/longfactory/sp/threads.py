"""Threads of what the host computes of a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations on the CPU in this thread alone.

    It divides those of more than 32,768 numbers among all threads. Of a row that gains nothing
    where the cores are idle, and where other processes have them waiting for the threads takes
    longer than the work (`benchmarks/row_threads.py`). AdamW on the host needs all threads, so they
    are put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
