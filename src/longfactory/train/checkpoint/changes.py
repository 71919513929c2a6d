"""What differs between a checkpoint and the run that goes on from it: refused where the
checkpoint's states cannot be loaded or would mean something else, otherwise applied and told.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from importlib import metadata
from typing import Any

from longfactory.config.adapter_facts import ADAPTERS
from longfactory.config.arguments import DataArguments
from longfactory.config.optimizer_facts import STATE_KEYS
from longfactory.errors import UserError

log = logging.getLogger("longfactory")

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


def refuse_other_samples(
    checkpoint: str,
    changes: dict[str, tuple[Any, Any]],
    then: dict[str, Any],
    now: dict[str, Any],
    *,
    of_a_step: tuple[int, int, int],
) -> None:
    """Refuses a run that would go on with other samples than the checkpoint's.

    Args:
        changes: of `changed_keys`.
        then, now: what decides which samples a step takes (`ResumableTrainer.run_state`).
        of_a_step: samples of a device, micro-batches and data-parallel groups of this run.
    Raises:
        UserError: with what differs and what to do.
    """
    if then["total_batch_size"] != now["total_batch_size"]:
        samples, micro_batches, groups = of_a_step
        raise UserError(
            f"The checkpoint {checkpoint} was made with {then['total_batch_size']} samples an"
            f" optimizer step; this run takes {now['total_batch_size']}"
            " (per_device_train_batch_size x gradient_accumulation_steps x data-parallel"
            f" groups = {samples} x {micro_batches} x {groups}). Change"
            " gradient_accumulation_steps so that they agree, or set ignore_data_skip: true to"
            " start the epoch's data again."
        )
    names = (
        "samples",
        "data_seed",
        "shuffle",
        "train_sampling_strategy",
        "dataloader_drop_last",
    )
    for key in names:
        if then.get(key, now[key]) != now[key]:
            raise UserError(
                f"The checkpoint {checkpoint} was made with {key} = {then[key]}, this run "
                f"has {now[key]}: it would continue with other "
                f"samples.{of_the_data(changes)} Use the same data and seed, or "
                "set ignore_data_skip: true."
            )
    if None not in (then.get("data"), now["data"]) and then["data"] != now["data"]:
        what = of_the_data(changes) or " Files of the data sets were changed."
        raise UserError(
            f"The checkpoint {checkpoint} was made with other training data: as many samples,"
            f" but not the same.{what} Use the same data, cutoff_len and template, or set"
            " ignore_data_skip: true."
        )


def tell(
    checkpoint: str,
    changes: dict[str, tuple[Any, Any]],
    manifest: dict[str, Any] | None,
    world: dict[str, Any],
) -> None:
    """What is different from the run that wrote the checkpoint, as lines of the log.

    Args:
        changes: of `changed_keys`.
        manifest: of the checkpoint, where it has one.
        world: `processes` and `sequence_parallel_size` of this run, as a manifest says them.
    """
    if changes:
        log.info(f"Changed since {checkpoint}, and applied: {in_words(changes)}.")
    if arithmetic := {k: v for k, v in changes.items() if k in ARITHMETIC}:
        log.warning(
            f"{in_words(arithmetic)}: results will be rounded differently than before {checkpoint}."
        )
    if manifest is None:
        return
    packages = changed_keys(manifest["versions"], versions())
    if packages:
        log.warning(
            f"Other versions than those of {checkpoint} ({in_words(packages)}): "
            "the last bits of results may differ."
        )
    then = manifest["world"]
    if then["processes"] != world["processes"]:
        log.warning(
            f"{checkpoint} was made by {then['processes']} processes, this run has "
            f"{world['processes']}. The steps take the same samples; sums are rounded in "
            "another order, and dropout draws new random numbers."
        )
    elif then["sequence_parallel_size"] != world["sequence_parallel_size"]:
        log.info(
            f"sequence_parallel_size: {then['sequence_parallel_size']} in {checkpoint},"
            f" {world['sequence_parallel_size']} now: sums are rounded in another order."
        )


def _family(optim: str) -> str:
    """adamw_torch and adamw_torch_fused have the same states."""
    return "adamw_torch" if optim == "adamw_torch_fused" else optim
