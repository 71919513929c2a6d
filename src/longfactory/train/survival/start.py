"""The first steps of a run: the watch, the store, what all ranks agree on, the lock."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longfactory import progress
from longfactory.errors import UserError
from longfactory.train.survival import lock
from longfactory.train.survival.board import Board, connect, open_store
from longfactory.train.survival.watch import Limits, Watch

if TYPE_CHECKING:
    from longfactory.config import RunConfig

PATIENCE = 10.0
"""Seconds that a request to the store may take on the watch's own connection."""


def begin() -> Watch | None:
    """The watch of this process, before anything slow. None outside of the main thread, where
    signals cannot be caught.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    watch = Watch(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    watch.start()
    return watch


def limits_of(cfg: RunConfig) -> Limits:
    """The time limits that a run's keys say."""
    keys = cfg.limits
    return Limits(
        startup=keys.startup_timeout,
        step=cfg.step_timeout,
        save=keys.save_timeout,
        evaluation=keys.evaluation_timeout,
        heartbeat=keys.heartbeat_timeout,
        grace=keys.signal_grace,
    )


def stacks_folder(cfg: RunConfig) -> Path:
    """Where the stacks of a run that does not move are written."""
    return cfg.output_dir / "stacks"


def take_lock(folder: Path) -> lock.FolderLock:
    """The lock of an output folder.

    Raises:
        UserError: another run holds it, or the folder cannot be made.
    """
    try:
        return lock.FolderLock(folder)
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be written: {error.strerror or error}. Choose another."
        ) from error


def meet(
    cfg: RunConfig, watch: Watch | None, *, writes: bool
) -> tuple[Any, lock.FolderLock | None]:
    """Where several processes were launched: opens the store, compares all ranks, and takes the
    lock of the output folder where no launcher holds it. Collective; before anything is loaded.

    Args:
        cfg: the run.
        watch: of this process; it gives signs of life from here on.
        writes: whether the run writes into its output folder.
    Returns:
        The store for the process group, None where there is one process or the group is open
        already; and the lock, where this process holds it.
    Raises:
        UserError: on every rank, with the same words.
    """
    import torch.distributed as dist

    from longfactory.train.survival.agreement import agree, differences, facts, refusal

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if watch is not None:
        watch.configure(limits_of(cfg), cfg.limits.stop_signals, stacks_folder(cfg))
    locks = writes and watch is not None and rank == 0 and not lock.held_by_launcher()
    held: list[lock.FolderLock] = []

    def before() -> str | None:
        if locks:
            try:
                held.append(take_lock(cfg.output_dir))
            except UserError as error:
                return str(error)
        return None

    if world == 1 or dist.is_initialized() or "MASTER_ADDR" not in os.environ:
        if world > 1 and dist.is_initialized():
            every: list[Any] = [None] * world
            dist.all_gather_object(every, facts(cfg))
            if lines := differences(every, ["this machine"] * world):
                raise UserError(refusal(lines))
        if problem := before():
            raise UserError(problem)
        return None, held[0] if held else None
    progress.moved("reaching the run's store")
    store = open_store(rank, world, cfg.limits.startup_timeout)
    if watch is not None:
        watch.attach(lambda: connect(rank, world, PATIENCE))
    agree(cfg, Board(store, rank, world), before)
    return store, held[0] if held else None
