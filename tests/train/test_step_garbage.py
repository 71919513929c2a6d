"""Python's garbage collector: a step of training leaves no tensor to it, which on a GPU is memory
that the next step does not have; and after the first step it looks at new objects alone.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longfactory.config import load_config
from longfactory.train.run import run
from longfactory.train.survival.start import begin
from longfactory.train.trainer import RowTrainer
from small_runs import LORA, POOLS, home, keys, run_on_ranks  # noqa: F401

pytestmark = pytest.mark.processes


def left_in_circles(words: list[str], cache: str) -> list[str]:
    """Runs what the words say and returns the tensors that the second and third step left in
    circles of references.
    """
    original, left, calls = RowTrainer.training_step, [], []

    def watched(self: RowTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 2:  # the first made what is made once and kept
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
        loss = original(self, *args, **kwargs)
        if len(calls) == 3:
            gc.collect()
            left.extend(
                f"{x.dtype} {tuple(x.shape)}" for x in gc.garbage if isinstance(x, torch.Tensor)
            )
        return loss

    RowTrainer.training_step = watched  # type: ignore[method-assign]
    try:
        run_on_ranks(words, cache)
    finally:
        RowTrainer.training_step = original  # type: ignore[method-assign]
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert len(calls) > 3
    return left


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_chunk": 16},
        {"bf16": True, "segment_layers": 2},
        {"use_asft_loss": True},
        {"use_asft_loss": True, "additional_target": "lm_head", **LORA},
        {"stage": "dpo", "dataset": "pairs", "packing": None},
        {"stage": "rm", "dataset": "pairs", "packing": None},
    ],
    ids=["sft", "segments", "asft", "asft_lora_on_the_head", "dpo", "rm"],
)
def test_no_tensor_of_a_step_is_left_in_a_circle(
    changes: dict[str, Any],
    size: int,
    home: Path,  # noqa: F811
) -> None:
    pairs = [
        {"prompt": "a" * (9 + i), "chosen": "b" * (5 + i), "rejected": "c" * (20 - i)}
        for i in range(12)
    ]
    (home / "pairs.json").write_text(json.dumps(pairs))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "talks": {"file_name": "talks.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    (home / "dataset_info.json").write_text(json.dumps(info))
    folder = changes.get("finetuning_type", "full")  # an adapter is not saved beside a whole model
    words = [
        f"{k}={v}" for k, v in keys(home, folder, sequence_parallel_size=size, **changes).items()
    ]
    assert POOLS[size].run(left_in_circles, words, str(home / "cache")) == [[]] * size


def frozen_at_steps(words: list[str], cache: str, watched: bool) -> list[int]:
    """How many objects the collector leaves alone in each micro-batch of a run, and after it."""
    os.environ["LONGFACTORY_CACHE"] = cache
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    original, counts = RowTrainer.training_step, []

    def counted(self: RowTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(gc.get_freeze_count())
        return original(self, *args, **kwargs)

    RowTrainer.training_step = counted  # type: ignore[method-assign]
    gc.unfreeze()
    always = gc.get_freeze_count()  # Python 3.12 has some of its own
    watch = begin() if watched else None
    try:
        run(load_config(words), watch)
    finally:
        if watch is not None:
            watch.close()
        RowTrainer.training_step = original  # type: ignore[method-assign]
    return [count - always for count in (*counts, gc.get_freeze_count())]


@pytest.mark.parametrize("watched", [True, False])
def test_a_run_of_its_own_process_freezes_what_is_there_after_its_first_step(
    watched: bool,
    home: Path,  # noqa: F811
) -> None:
    """One that is called in another program's process leaves its collector as it is."""
    given = keys(home, f"frozen_{watched}", sequence_parallel_size=1, max_steps=2)
    words = [f"{k}={v}" for k, v in given.items()]
    (counts,) = POOLS[1].run(frozen_at_steps, words, str(home / "cache"), watched)
    *first, third, fourth, after = counts
    assert first == [0, 0] and after == 0
    assert (min(third, fourth) > 100_000) if watched else third == fourth == 0
