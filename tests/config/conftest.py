from __future__ import annotations

import pytest

from launcher import without_launcher


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    without_launcher(monkeypatch)
    monkeypatch.delenv("ALLOW_EXTRA_ARGS", raising=False)
