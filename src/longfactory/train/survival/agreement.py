"""All ranks run the same: keys, data, code and versions, compared before anything is loaded.

Ranks that differ would train something else without a word (another learning rate), or wait for
each other in collectives that do not match. What differs is told by the rank and the key, with both
values; tokens and passwords are not compared and appear nowhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import longfactory
from longfactory import progress
from longfactory.config import RunConfig
from longfactory.config.arguments import GROUPS
from longfactory.config.fields import is_secret
from longfactory.config.loss_facts import split_loss_path
from longfactory.data.data_files import data_files
from longfactory.errors import UserError
from longfactory.memory import calibration
from longfactory.train.survival.board import Board

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "numpy", "flash-attn")
OF_A_MACHINE = frozenset(
    {
        # Folders may lie elsewhere on each machine: what is in them is compared where it is cheap.
        *("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters"),
        *("cache_dir", "dataset_dir", "tokenized_path", "output_dir", "logging_dir", "loss_path"),
        *("export_dir", "swanlab_logdir", "deepspeed"),
        # Compared on their own, once the ranks can (train/run.py).
        "resume_from_checkpoint",
        # Of a machine's devices and cores.
        *("nproc_per_node", "preprocessing_num_workers", "dataloader_num_workers"),
        *("dataloader_pin_memory", "dataloader_prefetch_factor", "overwrite_cache"),
    }
)
"""Keys that the machines of a run may have different values of."""
WHOLE = 1 << 26
ENDS = 1 << 20
"""Bytes up to which a file is compared whole, and of a longer one those of each end."""


def facts(cfg: RunConfig) -> dict[str, str]:
    """What must be the same on every rank, by the name that the user knows it by."""
    found: dict[str, str] = {}
    for group in GROUPS:
        values = getattr(cfg, group)
        for field in dataclasses.fields(values):
            if not is_secret(field.name) and field.name not in OF_A_MACHINE:
                found[field.name] = _text(getattr(values, field.name))
    for name, value in cfg.hf.items():
        if not is_secret(name) and name not in OF_A_MACHINE:
            found[name] = _text(value)
    for name, path in data_files(cfg.data_options()):
        found[f"data set {name}, {path.name}"] = digest(path)
    if cfg.method.loss_path is not None:
        path = split_loss_path(cfg.method.loss_path)[0]
        if path.is_file():
            found["loss_path, the file"] = digest(path)
    if isinstance(cfg.trainer.deepspeed, str) and Path(cfg.trainer.deepspeed).is_file():
        found["deepspeed, the file"] = digest(Path(cfg.trainer.deepspeed))
    if cfg.model.model_name_or_path is not None:
        config = Path(cfg.model.model_name_or_path) / "config.json"
        if config.is_file():
            found["model_name_or_path, config.json"] = digest(config)
        else:
            found["model_name_or_path"] = cfg.model.model_name_or_path
    measured = os.environ.get(calibration.VARIABLE)
    if measured and Path(measured).is_file():
        found[f"{calibration.VARIABLE}, the file"] = digest(Path(measured))
    for name in PACKAGES:
        found[f"version of {name}"] = _version(name)
    found["version of Python"] = ".".join(platform.python_version_tuple()[:2])
    found["code of longfactory"] = code_digest(Path(longfactory.__file__).parent)
    return found


def digest(path: Path) -> str:
    """Size and a short sha256: of the whole file, or of both ends of a long one."""
    size = path.stat().st_size
    sha = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE:
            sha.update(file.read())
        else:
            sha.update(file.read(ENDS))
            file.seek(-ENDS, 2)
            sha.update(file.read())
    return f"{size} bytes, sha256 {sha.hexdigest()[:16]}"


def code_digest(folder: Path) -> str:
    """sha256 of the Python files below a folder, by their relative paths."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(path.relative_to(folder).as_posix().encode())
        sha.update(path.read_bytes())
    return f"sha256 {sha.hexdigest()[:16]}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def differences(every: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """A sentence for each fact in which a rank differs from the first rank.

    Args:
        every: the facts of each rank.
        hosts: its machine.
    """
    first, lines = every[0], []
    for name in dict.fromkeys(name for facts in every for name in facts):
        mine = first.get(name, "not set")
        others: dict[str, list[int]] = {}
        for rank, facts in enumerate(every):
            if (value := facts.get(name, "not set")) != mine:
                others.setdefault(value, []).append(rank)
        for value, ranks in others.items():
            who = f"rank {', '.join(map(str, ranks[:8]))}" + (" and more" if ranks[8:] else "")
            lines.append(
                f"{name}: {value} on {who} ({hosts[ranks[0]]}), {mine} on rank 0 ({hosts[0]})"
            )
    return lines


def refusal(lines: Sequence[str]) -> str:
    """What the user reads."""
    return (
        "The processes of this run were started differently, so nothing was loaded:\n"
        + "\n".join(f"- {line}" for line in lines)
        + "\nStart every machine with the same file, keys, data and versions."
    )


def agree(cfg: RunConfig, board: Board, before: Callable[[], str | None] = lambda: None) -> None:
    """Compares this rank's facts with all others'. Collective, over the board alone: a rank that
    does not come is the watch's to name.

    Args:
        cfg: the run.
        board: on a connection of this thread.
        before: called on the first rank; a sentence where the run cannot start (the lock).
    Raises:
        UserError: on every rank, with the same words.
    """
    board.put(f"facts/{board.rank}", [facts(cfg), socket.gethostname()])
    if board.rank == 0:
        problem = before()
        missing = list(range(board.world))
        while missing:
            missing = [r for r in missing if not board.has(f"facts/{r}")]
            _wait(missing)
        every = board.get_all("facts")
        assert every is not None
        lines = differences([f for f, _ in every], [host for _, host in every])
        board.put("verdict", problem or (refusal(lines) if lines else ""))
    while (verdict := board.get("verdict")) is None:
        _wait([0])
    if verdict:
        raise UserError(verdict)
    progress.moved("preparing")


def _wait(missing: Sequence[int]) -> None:
    if missing:
        some = ", ".join(map(str, missing[:8])) + (" and more" if missing[8:] else "")
        progress.NOW.detail = f"waiting for rank {some} to start"
        time.sleep(0.05)
