"""What differs between a checkpoint and the run that goes on from it: refused where the
checkpoint's states cannot be loaded or would mean something else, otherwise applied and told.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib import metadata
from typing import Any

from longfactory.config.adapter_facts import ADAPTERS
from longfactory.config.arguments import DataArguments
from longfactory.config.optimizer_facts import STATE_KEYS
from longfactory.errors import UserError

ADAPTER = (
    "finetuning_type",
    "lora_rank",
    "lora_alpha",
    "lora_target",
    "lora_experts",
    "train_routers",
    "use_rslora",
    "use_dora",
    "use_llama_pro",
    "additional_target",
    "oft_rank",
    "oft_block_size",
    "oft_target",
)
"""Keys of what is trained: with other values the checkpoint's weights are of another model."""

TRAINED = (
    "use_llama_pro",
    "freeze_trainable_layers",
    "freeze_trainable_modules",
    "freeze_extra_modules",
    "train_mm_proj_only",
)

SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
BY_ITS_STATE = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose learning rate follows from what they have seen, and not from the step."""

ARITHMETIC = (
    *("bf16", "fp16", "pure_bf16", "tf32", "attention_backend"),
    *("quantization_bit", "quantization_method"),
)

DATA = frozenset({f.name for f in dataclasses.fields(DataArguments)} | {"seed", "data_seed"})
"""Keys that make samples and their order."""

QUIET = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "overwrite_cache",
        "run_name",
        "disable_tqdm",
        "ddp_timeout",
    }
)
"""Keys that change nothing in what is trained or written."""

PACKAGES = ("longfactory", "torch", "transformers", "accelerate", "peft", "deepspeed")


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def changed_keys(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (the checkpoint's value, the run's), of keys that both know."""
    return {
        name: (then[name], now[name])
        for name in sorted(then.keys() & now.keys() - QUIET)
        if then[name] != now[name]
    }


def in_words(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items())


def of_the_data(changes: dict[str, tuple[Any, Any]]) -> str:
    """A sentence on changed keys that make samples, or nothing."""
    data = {n: v for n, v in changes.items() if n in DATA}
    return f" Changed: {in_words(data)}." if data else ""


def refuse_other_states(
    checkpoint: str,
    changes: dict[str, tuple[Any, Any]],
    now: dict[str, Any],
    *,
    sharding: tuple[str | None, str | None] = (None, None),
) -> None:
    """Refuses what the checkpoint's weights and optimizer states cannot be loaded into.

    Args:
        changes: of `changed_keys`.
        now: the run's keys.
        sharding: how parameters were and are sharded (none, ddp, fsdp2, deepspeed).
    Raises:
        UserError: with the key, both values, and what to do.
    """
    lora = now.get("finetuning_type") in ADAPTERS
    key = "adapter_name_or_path" if lora else "model_name_or_path"
    weights = f"To start from its weights alone, name {checkpoint} in {key}."
    names = [
        n
        for n in ADAPTER
        if lora or not n.startswith(("lora_", "oft_", "use_")) or n == "finetuning_type"
    ]
    if now.get("finetuning_type") == "freeze":
        names += TRAINED
    elif now.get("use_llama_pro"):
        names.append("freeze_trainable_layers")
    other = {n: changes[n] for n in names if n in changes}
    if other:
        raise UserError(
            f"The checkpoint {checkpoint} trained something different from this run: "
            f"{in_words(other)}. Use the same values. {weights}"
        )
    if "optim" in changes and _family(changes["optim"][0]) != _family(changes["optim"][1]):
        raise UserError(
            f"The checkpoint {checkpoint} holds the states of another optimizer:"
            f" {in_words({'optim': changes['optim']})}. Use the same optim. {weights}"
        )
    states = {n: changes[n] for n in STATE_KEYS if n in changes}
    if states:
        raise UserError(
            f"The checkpoint {checkpoint} holds the states of another optimizer, or of other"
            f" settings of it: {in_words(states)}. Use the same values. {weights}"
        )
    schedule = {n: changes[n] for n in SCHEDULE if n in changes}
    kinds = changes.get("lr_scheduler_type", (now.get("lr_scheduler_type"),) * 2)
    if schedule and any(kind in BY_ITS_STATE for kind in kinds):
        raise UserError(
            f"The learning rate of lr_scheduler_type: {kinds[0]} depends on its history, so a "
            f"changed schedule cannot be applied: {in_words(schedule)}. Use the same values. "
            f"{weights}"
        )
    old, new = sharding
    if old and new and (old == "deepspeed") != (new == "deepspeed"):
        raise UserError(
            f"The checkpoint {checkpoint} holds the states of sharding: {old}, this run has"
            f" sharding: {new}, which cannot read them. Set sharding: {old}. {weights}"
        )


def _family(optim: str) -> str:
    """adamw_torch and adamw_torch_fused have the same states."""
    return "adamw_torch" if optim == "adamw_torch_fused" else optim
