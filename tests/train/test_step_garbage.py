"""A step of training leaves no tensor to Python's garbage collector: on a GPU that is memory which
the next step does not have.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

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
