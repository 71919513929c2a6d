"""For all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import process_state


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
