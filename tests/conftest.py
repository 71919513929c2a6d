"""For all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# As in the Makefile, for a `pytest tests` without it: torch sums what it computes in float32 in
# another order on another number of threads, and the processes of a test have one each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import process_state


def pytest_configure(config: pytest.Config) -> None:
    """Tests without a GPU are for CPUs on a machine with GPUs as well: their processes are more
    than its GPUs, and what they expect is of a CPU.
    """
    if "not gpu" in config.getoption("markexpr"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def nothing_is_left_changed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves its process changed fails, not one that comes after it. Of GPU tests,
    whose libraries set more, nothing is asked.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    before = process_state.settings()
    yield
    if changed := process_state.put_back(before):
        pytest.fail("left changed: " + "; ".join(changed), pytrace=False)


@pytest.fixture
def as_a_command() -> Iterator[None]:
    """For tests that call in this process what is made for one that ends with it: a command."""
    before = process_state.settings()
    yield
    process_state.put_back(before)
