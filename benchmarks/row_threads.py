"""What it takes to make a row of one document in one thread, and in all that PyTorch takes.

    python benchmarks/row_threads.py

On two idle cores both take as long (64,418 tokens: 8 to 9 ms and 7 to 8). With two other processes
that compute all the time: 8 to 18 ms in one thread, 29 to 33 in two. With some fifteen: 17 to 34 ms,
and 200 to 480; 32,210 tokens, which PyTorch does not divide, take as long either way (PyTorch 2.13,
CPU).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch

from longfactory.data.row import TokenizedDocument, make_row
from longfactory.sp.threads import one_thread

ROUNDS = 9


def milliseconds(
    tokens: int, threads: Callable[[], contextlib.AbstractContextManager[None]]
) -> float:
    """The median of a row's making and padding."""
    ids = [5] * tokens
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        with threads():
            make_row([TokenizedDocument(ids, ids, sample=0)]).padded(256, 0)
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)


def main() -> None:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds")
    for tokens in (32_210, 64_418, 1_048_576):
        one, every = milliseconds(tokens, one_thread), milliseconds(tokens, contextlib.nullcontext)
        print(f"{tokens:,} tokens: one thread {one:.1f}, all {every:.1f}")


if __name__ == "__main__":
    main()
