"""What the host does between a step's kernels, on one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's functions of tensors on the CPU run on this thread alone.

    By default they divide tensors of more than 32,768 numbers among the threads of a pool, and
    waking these takes longer than the work: a row of 64,418 tokens is made in 22 ms on one thread
    and in 90 on two (two cores). Two ranks with 32 threads each waited 130 to 190 ms for such a
    row, one with 32,210 tokens for 3 (H200, 64 cores). AdamW on the host needs the pool, so it is
    put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
