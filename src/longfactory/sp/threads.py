"""Threads of what the host computes of a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations on the CPU in this thread alone.

    It divides those of more than 32,768 numbers among all threads, and waking these takes longer
    than a row's work: a row of 64,418 tokens is made in 22 ms in one thread and in 90 in two (two
    cores); beside other processes on the cores an operation takes 12 ms, and 0.02 in one thread.
    AdamW on the host needs all threads, so they are put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
