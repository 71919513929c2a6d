"""The pool of ranks survives what tests do to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from longfactory.processes import state_of
from longfactory.testing import RankError, RankPool, assert_matches_single_process


def rank() -> int:
    total = torch.tensor(1)
    dist.all_reduce(total)
    return dist.get_rank() * 10 + int(total)


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def sleep() -> None:
    time.sleep(60)


@pytest.mark.processes
def test_a_pool_goes_on_after_every_failure() -> None:
    pool = RankPool(2)
    try:
        assert pool.run(rank) == [2, 12]
        with pytest.raises(RankError, match="exit code 3"):
            pool.run(die_on_one)
        assert pool.run(rank) == [2, 12]
        with pytest.raises(RankError, match=r"no answer from ranks \[0, 1\]"):
            pool.run(sleep, timeout=0.5)
    finally:
        pool.stop()


CALLER = """
import os, signal
from longfactory import testing
testing.IMPORTED = ()
pool = testing.RankPool(2)
print(*pool.run(os.getpid), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.processes
def test_ranks_end_with_a_caller_that_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", CALLER], capture_output=True, text=True)
    ranks = [int(each) for each in done.stdout.split()]
    assert len(ranks) == 2, done.stderr
    late = time.monotonic() + 10
    while left := [rank for rank in ranks if state_of(rank) not in (None, "Z", "X")]:
        assert time.monotonic() < late, left
        time.sleep(0.05)


def make_group() -> int:
    """A group, and the threads that there are with it."""
    dist.barrier(dist.new_group())
    return len(os.listdir("/proc/self/task"))


def what_is_left() -> tuple[int, int, str | None]:
    """Process groups, threads, and a variable of the caller's environment."""
    threads = len(os.listdir("/proc/self/task"))
    return len(dist.distributed_c10d._world.pg_map), threads, os.environ.get("OF_THE_CALLER")


@pytest.mark.processes
def test_groups_end_with_the_function_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a group that nobody needs any longer wake up a hundred times a second."""
    monkeypatch.setenv("OF_THE_CALLER", "here")
    pool = RankPool(2)
    try:
        pool.run(what_is_left)  # the first answer starts a thread that sends answers
        _, before, given = pool.run(what_is_left)[0]
        assert given == "here"
        assert all(threads > before for threads in pool.run(make_group))
        assert pool.run(what_is_left) == [(1, before, "here")] * 2
        pool.keep_groups = True
        pool.run(make_group)
        assert [groups for groups, *_ in pool.run(what_is_left)] == [2, 2]
    finally:
        pool.stop()


def test_difference_names_the_tensor() -> None:
    a = {"x": torch.zeros(2), "y": torch.ones(2)}
    assert_matches_single_process(a, {"x": torch.zeros(2), "y": torch.ones(2) + 1e-7}, 1e-6)
    with pytest.raises(AssertionError, match="y differs"):
        assert_matches_single_process(a, {"x": torch.zeros(2), "y": torch.ones(2) + 1e-3}, 1e-6)
    with pytest.raises(AssertionError, match="x differs"):
        assert_matches_single_process({**a, "x": torch.full((2,), float("nan"))}, a, 1e-6)
    with pytest.raises(AssertionError, match="z differs"):
        assert_matches_single_process(a, {**a, "z": torch.zeros(1)}, 1e-6)
