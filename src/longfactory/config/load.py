"""Reads a run: from words and files to a checked `RunConfig`. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from longfactory.config import (
    accelerate_launch,
    checks,
    folder,
    megatron_keys,
    no_effect,
    packages,
    translate,
    unread,
    v1_keys,
)
from longfactory.config.adapter_facts import trains_adapters
from longfactory.config.arguments import GROUPS
from longfactory.config.fields import keys_of, plain
from longfactory.config.read import read
from longfactory.config.run import RunConfig
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.errors import ConfigError

Command = Literal["train", "export", "chat", "api"]


def load_config(
    argv: Sequence[str], *, command: Command = "train", world_size: int | None = None
) -> RunConfig:
    """Reads, translates, types and checks a run. Imports neither torch nor transformers.

    Args:
        argv: `["x.yaml", "learning_rate=1e-5", ...]` or `["--stage", "sft", ...]`.
        command: what the run is for; training asks for data and an output folder.
        world_size: number of processes; default what the launcher's environment says, else unknown.
    Raises:
        ConfigError: with one sentence a problem.
    """
    return from_mapping(read(argv, translate.is_switch), command=command, world_size=world_size)


def from_mapping(
    written: Mapping[str, Any], *, command: Command = "train", world_size: int | None = None
) -> RunConfig:
    """`load_config` from keys and values."""
    of_others: list[str] = []
    if v1_keys.is_v1(written):
        written, of_others = v1_keys.translated(written)
    elif megatron_keys.is_megatron(written):
        written, of_others = megatron_keys.translated(written)
    translate.other_file(written)
    # What is wrong is gathered before anything is raised, so that a person sees it at once.
    values, notes, problems = translate.known(written)
    notes = [*of_others, *notes]
    try:
        values = translate.rename(values)
        notes += translate.drop_others(values)
        notes += translate.turn(values)
    except ConfigError as e:
        raise ConfigError("\n".join([*problems, str(e)])) from e

    if command == "train" and (asked := accelerate_launch.keys_of(os.environ, values)):
        values |= asked
        said = ", ".join(f"{name}: {value}" for name, value in asked.items())
        notes.append(f"accelerate launch asks for {plain(said)}.")

    given = set(values)
    groups, hf, wrong = _parsed(values)
    if problems := [*problems, *wrong, *unread.problems(os.environ)]:
        raise ConfigError("\n".join(problems))

    cfg = RunConfig(**groups, hf=hf, notes=())
    notes += unread.notes(os.environ, cfg.model.model_name_or_path)
    if command == "train":
        cfg = dataclasses.replace(cfg, hf=_finished(cfg))
        problems, missing = _problems_of_training(cfg, world_size)
        notes += missing
    else:
        problems = list(checks.inference(cfg, command))
    if problems:
        raise ConfigError("\n".join(problems))
    if command == "train":
        notes += no_effect.idle(cfg, given)
        notes += no_effect.negative_steps(cfg)
        found, more = folder.find_checkpoints(cfg)
        notes += more
        cfg = dataclasses.replace(cfg, checkpoints=found)
    return dataclasses.replace(cfg, notes=tuple(notes))


def _parsed(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The groups of arguments, transformers' own, and a sentence for each value that is none."""
    problems: list[str] = []

    def parse(keys: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        parsed = {}
        for name in names:
            try:
                parsed[name] = keys[name].parse(values[name])
            except ConfigError as e:
                problems.append(str(e))
        return parsed

    groups, grouped = {}, set()
    for group, cls in GROUPS.items():
        keys = keys_of(cls)
        names = [name for name in keys if name in values]
        grouped.update(names)
        groups[group] = cls(**parse(keys, names))
    hf = parse(TRAINER_KEYS, [name for name in values if name not in grouped])
    return groups, hf, problems


def _problems_of_training(cfg: RunConfig, world_size: int | None) -> tuple[list[str], list[str]]:
    """What a run cannot be started with; and, for --dry_run alone, packages that are missing."""
    if world_size is None and "LOCAL_RANK" in os.environ:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if problems := list(checks.training(cfg, world_size)):
        return problems, []
    missing = list(packages.missing(cfg))
    return ([], missing) if cfg.output.dry_run else (missing, [])


def _finished(cfg: RunConfig) -> dict[str, Any]:
    """`cfg.hf` with what follows from other keys."""
    hf = dict(cfg.hf)
    if not any(hf.get(name) for name in ("do_train", "do_eval", "do_predict")):
        hf["do_train"] = True
    if cfg.trainer.eval_strategy != "no" or cfg.trainer.eval_on_start:
        hf["do_eval"] = True
    for name in ("report_to", "optim_target_modules"):
        if hf.get(name) is not None:
            hf[name] = list(hf[name])
    if cfg.output.use_swanlab:
        others = [name for name in hf.get("report_to") or [] if name not in ("none", "swanlab")]
        hf["report_to"] = [*others, "swanlab"]
        if cfg.output.swanlab_run_name is not None:
            hf.setdefault("run_name", cfg.output.swanlab_run_name)
    if not hf.get("report_to", True):
        hf["report_to"] = "none"
    if trains_adapters(cfg.method):
        hf.setdefault("ddp_find_unused_parameters", False)
    if cfg.method.early_stopping_steps is not None:
        hf.setdefault("metric_for_best_model", "loss")
        if hf["metric_for_best_model"] in ("loss", "eval_loss"):
            hf.setdefault("greater_is_better", False)
    return hf
