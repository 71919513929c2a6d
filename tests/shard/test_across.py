"""A checkpoint of one sharding goes on with another: weights, optimizer states, learning rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpu_sharding import on_ranks_of_their_own
from saving_worker import go_on_with_another_sharding


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(400)
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_the_next_step_is_the_same(first: str, then: str, adapter: bool, tmp_path: Path) -> None:
    on_ranks_of_their_own(2, 350, go_on_with_another_sharding, first, then, adapter, str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert [kind.endswith("FSDP") for kind in result["kinds"]] == [
        first == "fsdp2",
        then == "fsdp2",
    ]
    whole, resumed = result["losses"]
    assert len(whole) == 2 and resumed == pytest.approx(whole, rel=1e-6)
    assert result["differ"] < 1e-4  # one step of Adam with a learning rate of 0.05
