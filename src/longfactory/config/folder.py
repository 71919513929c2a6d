"""The output folder before a run: empty, an earlier part of the same run, or another run's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longfactory.config.read import read_file
from longfactory.config.run import RunConfig
from longfactory.config.show import resolved
from longfactory.errors import ConfigError

RUN_FILE = "longfactory.yaml"
"""Written beside the checkpoints: the resolved run. `longfactory train
<output_dir>/longfactory.yaml` runs it again.
"""

TRAINER_STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint."""

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
IDENTITY = (
    "stage",
    "finetuning_type",
    "model_name_or_path",
    "dataset",
    "template",
    "lora_rank",
    "lora_target",
)
"""Runs that differ in one of these are different runs; the rest (length, learning rate,
sequence_parallel_size) may change on resuming.
"""

REMEDY = "Choose another folder, or set overwrite_output_dir: true."


def last_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-N` with the greatest N that was written to its end, or None."""
    return next((p for p in _checkpoints(folder) if (p / TRAINER_STATE).is_file()), None)


def _checkpoints(folder: Path) -> list[Path]:
    """The last one first."""
    found = [
        (int(m[1]), p)
        for p in folder.glob("checkpoint-*")
        if p.is_dir() and (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [p for _, p in sorted(found, reverse=True)]


def find_checkpoint(cfg: RunConfig) -> tuple[str | None, list[str]]:
    """Where the run goes on from, as in LLaMA-Factory: what was asked for, else the last checkpoint
    of the output folder.

    Returns:
        The checkpoint's folder, None where the run begins anew; and notes for the user.
    Raises:
        ConfigError: the checkpoint does not exist, or the folder holds another run.
    """
    asked = cfg.trainer.resume_from_checkpoint
    out = cfg.output_dir
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir: {out} is a file, expected a folder.")
    if isinstance(asked, str):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint: there is no folder {asked}.")
        if not (Path(asked) / TRAINER_STATE).is_file():
            raise ConfigError(
                f"resume_from_checkpoint: {asked} holds no {TRAINER_STATE}, so it is no checkpoint."
                " Give a folder checkpoint-<step>; to start from weights, name them in"
                " model_name_or_path."
            )
        return asked, []
    if not cfg.trainer.do_train or asked is False:
        return None, []
    last = last_checkpoint(out) if out.is_dir() else None
    if asked is True and last is None:
        raise ConfigError(
            f"resume_from_checkpoint: there is no checkpoint in {out}. Give the folder of one, or"
            " leave the key out."
        )
    if cfg.output.overwrite_output_dir and asked is not True:
        if last is None:
            return None, []
        return None, [
            f"{out} keeps the checkpoints of an earlier run, up to {last.name}. Remove them, or a"
            " later start resumes from there."
        ]
    other = _differences(cfg, out)
    if other:
        raise ConfigError(
            f"output_dir: {out} holds another run ({'; '.join(other)}). Choose another folder, or"
            " set overwrite_output_dir: true."
        )
    incomplete = [p.name for p in _checkpoints(out) if not (p / TRAINER_STATE).is_file()]
    notes = [
        f"{out}/{name} is incomplete ({TRAINER_STATE} is missing) and will be ignored."
        for name in incomplete
    ]
    if last is not None:
        return str(last), [*notes, f"Resuming from {last}. To begin anew: {REMEDY}"]
    if any((out / name).is_file() for name in WEIGHTS):
        raise ConfigError(
            f"output_dir: {out} holds a finished run without checkpoints. Choose another folder, or"
            " set overwrite_output_dir: true."
        )
    return None, notes


def _differences(cfg: RunConfig, out: Path) -> list[str]:
    """In what the run that wrote the folder differs from this one; empty where there is none, or
    none that wrote its file.
    """
    path = out / RUN_FILE
    if not path.is_file() or (
        last_checkpoint(out) is None and not any((out / name).is_file() for name in WEIGHTS)
    ):
        return []
    old = read_file(path)
    found = []
    for name in IDENTITY:
        if name.startswith("lora_") and cfg.method.finetuning_type != "lora":
            continue
        new = next(
            (getattr(g, name) for g in (cfg.model, cfg.data, cfg.method) if hasattr(g, name)), None
        )
        if name in old and _plain(old[name]) != _plain(new):
            found.append(f"its {name} is {_words(old[name])}, this run's {_words(new)}")
    return found


def _plain(value: Any) -> Any:
    return sorted(str(v) for v in value) if isinstance(value, (list, tuple)) else value


def _words(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def write(cfg: RunConfig) -> None:
    """Writes the resolved run beside the checkpoints. For one process to call."""
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    (cfg.output_dir / RUN_FILE).write_text(resolved(cfg), encoding="utf-8")
