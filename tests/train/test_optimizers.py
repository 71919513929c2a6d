"""Optimizers whose states a checkpoint cannot hold are refused where they would be saved or read."""

from __future__ import annotations

import types

import pytest

from longfactory.errors import UserError
from longfactory.train.memory_plan import Memory
from longfactory.train.optimizers import check_checkpoints


def memory(placement: str, split: bool) -> Memory:
    plan = types.SimpleNamespace(settings=types.SimpleNamespace(optimizer=placement))
    return Memory(plan, split)  # type: ignore[arg-type]


@pytest.mark.parametrize(("placement", "split"), [("host", False), ("host", True), ("gpu", True)])
@pytest.mark.parametrize(("saves", "resumes"), [(True, False), (False, True)])
def test_sharded_states_that_would_be_lost_are_refused(placement: str, split: bool, saves: bool, resumes: bool) -> None:
    with pytest.raises(UserError, match="save_only_model: true"):
        check_checkpoints(memory(placement, split), "fsdp2", saves_states=saves, resumes=resumes)


@pytest.mark.parametrize(
    ("placement", "split", "sharding", "saves"),
    [("gpu", False, "fsdp2", True), ("host", True, "none", True), ("host", True, "fsdp2", False)],
)
def test_everything_else_passes(placement: str, split: bool, sharding: str, saves: bool) -> None:
    check_checkpoints(memory(placement, split), sharding, saves_states=saves, resumes=False)
