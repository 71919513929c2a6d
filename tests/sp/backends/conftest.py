from __future__ import annotations

from collections.abc import Iterator

import pytest

from longfactory.sp import backends


@pytest.fixture
def nothing_chosen() -> Iterator[None]:
    """A process that has chosen no backend yet; afterwards too, for what was chosen among
    stand-ins.
    """
    backends.forget_choices()
    yield
    backends.forget_choices()
