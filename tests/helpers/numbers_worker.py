"""Runs with sharded parameters in which a loss, or a gradient, of the second step is no number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cpu_sharding
from longfactory.errors import UserError
from saving_worker import make, whole, write_base


def end_of_sharded(sharding: str, on_nan: str, what: str, path: str) -> dict[str, Any]:
    """Body of a rank of a pool of its own.

    Returns:
        error: how the run ended, or None; steps: of the log; finite: whether all weights are.
    """
    folder = Path(path)
    if dist.get_rank() == 0:
        write_base(folder / "base")
    dist.barrier()
    cpu_sharding.start(sharding)
    trainer = make(sharding, folder / "out", 1)
    trainer.numbers.on_nan = on_nan  # type: ignore[assignment]
    original = trainer.stage_loss

    def stage_loss(model: Any, row: Any) -> Any:
        loss, metrics = original(model, row)
        if trainer.state.global_step == 1 and dist.get_rank() == 1:
            if what == "loss":
                loss = loss * math.nan
            else:
                loss.register_hook(lambda g: g * math.inf)
        return loss, metrics

    trainer.stage_loss = stage_loss  # type: ignore[method-assign]
    error = None
    try:
        trainer.train()
    except UserError as e:
        error = str(e)
    finite = all(bool(torch.isfinite(w).all()) for w in whole(trainer).values())
    return {
        "error": error,
        "finite": finite,
        "log": [h for h in trainer.state.log_history if "learning_rate" in h],
        "saved": sorted(p.name for p in (folder / "out").glob("checkpoint-*")),
        "kind": str(trainer.accelerator.distributed_type),
    }
