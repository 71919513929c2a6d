"""A parameter that gets no gradient on one process alone, from some row on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cpu_sharding
from longfactory.errors import UserError
from longfactory.testing import RankError, run_ranks
from longfactory.train.gradients import refuse_unused
from manual_runs import manual_run

pytestmark = pytest.mark.processes

NORM = "model.layers.1.post_attention_layernorm"
KEY = "Set ddp_find_unused_parameters: true"


def passed_by(keys: dict[str, Any], first: int = 3) -> list[float]:
    """Body of a rank: losses of a run in which the second process goes past a norm from some row
    on.
    """
    from longfactory.config import from_mapping
    from longfactory.sp import hf
    from longfactory.train import run as module
    from longfactory.train.trainer import RowTrainer

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    rows = 0
    trainers = []
    own = RowTrainer.token_outputs

    def token_outputs(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        trainers.append(self)
        rows += 1
        norm = hf.unwrap(model).get_submodule(NORM)
        if rows < first or dist.get_rank() == 0:
            return own(self, model, *args, **kwargs)
        with mock.patch.object(norm, "forward", lambda x: x):
            return own(self, model, *args, **kwargs)

    with mock.patch.object(RowTrainer, "token_outputs", token_outputs):
        module.run(from_mapping({k: v for k, v in keys.items() if k != "cache"}))
    return [line["loss"] for line in trainers[0].state.log_history if "loss" in line]


def keys_of(home: Path, **more: Any) -> dict[str, Any]:
    return manual_run(
        home,
        dataset="manual_sft",
        stage="sft",
        max_samples=12,
        per_device_train_batch_size=1,
        sequence_parallel_size=1,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        save_final_model=False,
        report_to="none",
        output_dir=str(home / "out"),
        disable_gradient_checkpointing=True,
        **more,
    )


def test_a_gradient_that_one_process_lacks_ends_the_run_with_its_name(tmp_path: Path) -> None:
    """In the same step, before another message of that process is taken for the gradient."""
    with pytest.raises(RankError) as found:
        cpu_sharding.on_ranks_of_their_own(2, 120, passed_by, keys_of(tmp_path))
    assert f"from the rows of this process: {NORM}.weight. With DDP" in str(found.value)
    assert KEY in str(found.value)


def test_a_gradient_of_an_earlier_micro_batch_is_not_taken_for_it(tmp_path: Path) -> None:
    """Of the run's only step the norm has a gradient from all rows but the last."""
    keys = {**keys_of(tmp_path, gradient_accumulation_steps=4), "max_steps": 1}
    with pytest.raises(RankError) as found:
        cpu_sharding.on_ranks_of_their_own(2, 60, passed_by, keys, 4)
    assert f"from the rows of this process: {NORM}.weight. With DDP" in str(found.value)


def test_with_the_key_that_is_named_the_run_goes_on(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, ddp_find_unused_parameters=True)
    for losses in run_ranks(2, passed_by, keys, timeout=120):
        assert len(losses) == 4


def unreduced() -> str | None:
    """Body of a rank: what is said of torch's own error."""
    from longfactory.train.gradients import explain_unreduced

    module = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2, bias=False)})
    module["first"].bias.requires_grad_(False)
    module.forward = lambda x: module["first"](x)
    model = DistributedDataParallel(module)
    model(torch.ones(1, 2)).sum().backward()
    try:
        model(torch.ones(1, 2))
    except RuntimeError as error:
        assert explain_unreduced(RuntimeError("another"), model) is None
        return explain_unreduced(error, model)
    return None


def test_torch_s_own_error_names_the_parameters_and_the_key() -> None:
    for said in run_ranks(2, unreduced, timeout=60):
        assert said is not None and ": second.weight. With DDP" in said and KEY in said


def test_a_torch_without_the_method_that_finds_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(DistributedDataParallel, "_check_reducer_finalized")
    model = mock.Mock(spec=DistributedDataParallel, find_unused_parameters=False)
    trainer: Any = mock.Mock(model_wrapped=model)
    with pytest.raises(UserError, match=r"_check_reducer_finalized.*ddp_find_unused_parameters"):
        refuse_unused(trainer)
