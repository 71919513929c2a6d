"""The resolved run as YAML that can be read again."""

from __future__ import annotations

import os
from typing import Any

import yaml

from longfactory.config.arguments import GROUPS
from longfactory.config.fields import is_secret, keys_of
from longfactory.config.read import EXPONENT
from longfactory.config.run import RunConfig
from longfactory.config.stage_facts import STAGES
from longfactory.config.trainer_keys import TRAINER_KEYS

OURS = ("resume_from_checkpoint",)
"""Trainer keys that are found anew at each start, so left out of the YAML."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that our reader would take for a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))


def _escaped(value: Any) -> Any:
    """Texts so that our reader takes ${...} in them for text."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, (list, tuple)):
        return [_escaped(x) for x in value]
    return {k: _escaped(x) for k, x in value.items()} if isinstance(value, dict) else value


def _dump(values: dict[str, Any]) -> str:
    return yaml.dump(
        _escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    ).rstrip()


def resolved(cfg: RunConfig, world_size: int | None = None) -> str:
    """The run as YAML that can be run again: first the arithmetic as comments, then what was
    chosen, then every default.
    """
    chosen: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for group, cls in GROUPS.items():
        for name, key in keys_of(cls).items():
            value = getattr(getattr(cfg, group), name)
            if is_secret(name) or name == "dry_run":
                continue
            (defaults if value == key.default else chosen)[name] = (
                list(value) if isinstance(value, tuple) else value
            )
    for name, value in cfg.hf.items():
        if not is_secret(name) and name not in OURS:
            chosen[name] = value
    parts = ["\n".join(f"# {line}" for line in arithmetic(cfg, world_size))]
    parts += [_dump(chosen)]
    parts += ["# Defaults", _dump(defaults)]
    return "\n\n".join(parts) + "\n"


def settings(cfg: RunConfig) -> dict[str, Any]:
    """Every key of a run with its value, as JSON can hold it; without secrets and without what is
    found anew at each start.
    """
    found: dict[str, Any] = {
        name: getattr(getattr(cfg, group), name)
        for group, cls in GROUPS.items()
        for name in keys_of(cls)
    }
    found |= {name: getattr(cfg.trainer, name) for name in TRAINER_KEYS}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if not is_secret(name) and name not in (*OURS, "dry_run")
    }


def processes(cfg: RunConfig) -> int | None:
    """Number of processes where the keys or the environment say it, else None."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    local = cfg.parallel.nproc_per_node or os.environ.get("NPROC_PER_NODE")
    return int(local) * int(os.environ.get("NNODES", "1")) if local is not None else None


def arithmetic(cfg: RunConfig, world_size: int | None = None) -> list[str]:
    """What follows from the numbers: groups, samples a step, tokens a device."""
    batch, steps = (
        cfg.trainer.per_device_train_batch_size,
        cfg.trainer.gradient_accumulation_steps,
    )
    world = world_size if world_size is not None else processes(cfg)
    lines = [f"{cfg.method.stage}, {cfg.method.finetuning_type}, {cfg.model.model_name_or_path}"]
    if cfg.undecided:
        keys = " and ".join(f"{name}: auto" for name in cfg.undecided)
        return [*lines, f"{keys}: decided when the run starts, as `longfactory plan` says"]
    mode, size, row = (
        cfg.parallel.sequence_parallel_mode,
        cfg.sequence_parallel_size,
        cfg.longest_row,
    )
    samples = [str(n) for n in (batch, STAGES[cfg.method.stage].documents) if n > 1]
    what = " x ".join([*samples, f"cutoff_len {cfg.cutoff_len}"])
    if size > 1:
        lines.append(
            f"tokens of a row on each device: {what} / sequence_parallel_size"
            f" {size} = {-(-row // size)}"
            f" ({mode})"
        )
    kind = "packed rows" if cfg.packing else STAGES[cfg.method.stage].items
    if world is None:
        lines.append(
            f"{kind} per step: (processes / sequence_parallel_size {size}) x "
            f"per_device_train_batch_size {batch} x gradient_accumulation_steps {steps}"
        )
    else:
        groups = world // size
        lines.append(f"processes: {world} = {groups} groups x sequence_parallel_size {size}")
        total = groups * batch * steps
        lines.append(
            f"{kind} per step: {groups} groups x batch {batch} x accumulation {steps} = {total}, at"
            f" most {total * cfg.longest_sample:,} tokens"
        )
    return lines
