"""Runs in pools of ranks that a signal stops. A rank is a whole process with a watch of its own; what
a launcher does is not in it (tests/test_launch.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from longfactory import progress
from longfactory.errors import Stopped

HOOK = """
import os, signal

sent = []

def loss(outputs, row):
    from longfactory import progress

    if not sent and progress.NOW.step == {step} and os.environ.get("RANK", "0") == "{rank}":
        sent.append(True)
        os.kill(os.getpid(), signal.{signal})
        import time
        time.sleep(1.2)  # so that its watch has seen it before the step is over
    return -outputs.logps
"""
"""A `loss_path` file that signals its own process in a step."""


def run_until_stopped(argv: list[str], cache: str, store: str) -> str:
    """A run with a watch. What it said where a signal stopped it, else empty."""
    from longfactory.config import load_config
    from longfactory.train.run import run
    from longfactory.train.survival.board import Board
    from longfactory.train.survival.watch import Watch

    os.environ["LONGFACTORY_CACHE"], os.environ["TQDM_DISABLE"] = cache, "1"
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 and dist.is_initialized():
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    rank = dist.get_rank() if world > 1 else 0
    progress.enter("start-up", step=0)
    watch = Watch(rank, world)
    watch.start()
    if world > 1:

        def connect() -> Board:
            return Board(dist.PrefixStore(Path(store).name, dist.FileStore(store, -1)), rank, world)

        watch.attach(connect)
    try:
        run(load_config(argv), watch)
    except Stopped as stopped:
        return str(stopped)
    finally:
        watch.close()
    return ""
