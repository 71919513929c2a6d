"""Which processes see the same output folder, and who writes there.

Where all machines share a file system one process writes what is whole (weights, the manifest), and
renames. Where each has its own, `save_on_each_node: true` makes the first process of each machine
do so, and every machine has a checkpoint of its own; sharded states, of which each process writes a
part that any other may need, cannot be saved so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longfactory.errors import UserError
from longfactory.train.checkpoint.manifest import share
from longfactory.train.ranks import from_all, from_main, is_distributed

log = logging.getLogger("longfactory")
MARK = ".longfactory-mark-"


def check_place(args: Any, *, sharded: bool, saves: bool) -> None:
    """Finds out whether all processes see the same output folder, and makes `save_on_each_node`
    agree with it. Collective; the folder exists where processes write.

    Args:
        args: transformers' TrainingArguments; `save_on_each_node` may be turned off.
        sharded: each process writes a part of the model or of the optimizer's states.
        saves: checkpoints are written from which a run can go on.
    Raises:
        UserError: on every rank, where checkpoints could not be resumed from.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not is_distributed() or args.world_size <= local_world:
        return
    shared = _is_shared(Path(args.output_dir))
    if shared and args.save_on_each_node:
        log.warning(
            "save_on_each_node is turned off: all machines see the same output_dir "
            f"({args.output_dir}), and would write the same files at the same time."
        )
        args.save_on_each_node = False
    if shared or not saves:
        return
    if sharded:
        raise UserError(
            f"output_dir: {args.output_dir} is not on a file system that all machines share, and"
            " with sharded parameters each process writes a part that the others need. Choose a"
            " shared folder, or save_only_model: true, or save_strategy: no."
        )
    if not args.save_on_each_node:
        raise UserError(
            f"output_dir: {args.output_dir} is not on a file system that all machines share, "
            "so its checkpoints could not be resumed from. Choose a shared folder, or set "
            "save_on_each_node: true, or save_only_model: true."
        )


def _is_shared(folder: Path) -> bool:
    """Whether every process sees a file that the first one makes. Collective."""
    mark = folder / from_main(MARK + uuid.uuid4().hex[:12])
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        with contextlib.suppress(OSError):
            mark.touch()
    from_all(None)  # it is there
    seen = all(from_all(mark.exists()))
    if first:
        mark.unlink(missing_ok=True)
    return seen


def place_of(args: Any) -> int:
    """A number that processes with the same output folder have alike."""
    return args.process_index - args.local_process_index if args.save_on_each_node else 0


def share_of_files(sizes: Mapping[str, int]) -> list[str]:
    """The files that this process reads, of those that every process sees.

    Where machines have folders of their own each machine's processes read all files of theirs, so
    shares are made among the processes of a machine.
    """
    rank, world = int(os.environ.get("LOCAL_RANK", "0")), _local_world()
    return share(sizes, world, rank % world)


def _local_world() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if is_distributed() else 1
