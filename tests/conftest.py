"""What all tests share."""

from __future__ import annotations

import pytest

from longfactory import testing


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ranks end with the tests of a folder: the threads of all the groups that they have made would go on polling."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        testing.stop_pools()
