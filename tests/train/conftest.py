"""What several files of tests start from."""

from __future__ import annotations

from typing import Any

import pytest

from manual_runs import manual_sft


@pytest.fixture(scope="module")
def sft_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of a run over two processes on the quickstart's conversations, and its `cache`."""
    return manual_sft(tmp_path_factory.mktemp("sft"))
