"""What a configuration knows of the optimizers that have a switch of their own (`use_muon`, ...):
their package, how parameters may be sharded under them, and what contradicts them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longfactory.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class OptimizerFacts:
    """One of them.

    `module`, `package`: what computes it, None for torch and this project. `fsdp2`: why it cannot
    train FSDP2's shards, None where it can. `lora`: whether it trains adapters. `optims`: values of
    `optim` that it stands beside.
    """

    name: str
    module: str | None
    package: str | None
    fsdp2: str | None
    lora: bool
    optims: tuple[str, ...] = ("adamw_torch", "adamw_torch_fused")
    prefix: str = ""


_ROWS = "FSDP2 gives each device only some rows of a matrix"
METHOD_OPTIMIZERS = {
    facts.name: facts
    for facts in (
        OptimizerFacts("use_muon", None, None, None, True),
        OptimizerFacts(
            "use_galore",
            "galore_torch",
            "galore-torch",
            f"GaLore decomposes whole gradient matrices, and {_ROWS}",
            False,
            ("adamw_torch", "adamw_torch_fused", "adafactor"),
            "galore_",
        ),
        OptimizerFacts(
            "use_apollo",
            "apollo_torch",
            "apollo-torch",
            f"APOLLO projects whole gradient matrices, and {_ROWS}",
            False,
            prefix="apollo_",
        ),
        OptimizerFacts("use_badam", None, None, None, False, prefix="badam_"),
        OptimizerFacts(
            "use_adam_mini",
            "adam_mini",
            "adam-mini",
            "Adam-mini keeps one second moment for each attention head, and the rows of a head"
            " would lie on several devices",
            False,
        ),
    )
}
"""By the key that switches it on."""


STATE_KEYS = (
    *METHOD_OPTIMIZERS,
    *("galore_target", "galore_rank", "galore_proj_type", "galore_layerwise"),
    *("apollo_target", "apollo_rank", "apollo_proj", "apollo_proj_type", "apollo_layerwise"),
    *("badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_mode"),
    "badam_update_ratio",
)
"""Keys that say which states there are: with other values a checkpoint's are of something else."""


def chosen(cfg: RunConfig) -> OptimizerFacts | None:
    """The optimizer that a switch of the run names, or None for `optim` alone."""
    facts = next((f for f in METHOD_OPTIMIZERS.values() if getattr(cfg.method, f.name)), None)
    if facts is not None and facts.name == "use_badam" and cfg.method.badam_mode == "ratio":
        why = "badam_mode: ratio counts the entries of whole matrices, and "
        return dataclasses.replace(facts, fsdp2=why + _ROWS)
    return facts


def in_backward(cfg: RunConfig) -> str | None:
    """The key by which GaLore or APOLLO updates each matrix as soon as its gradient is there."""
    names = ("galore_layerwise", "apollo_layerwise")
    facts = chosen(cfg)
    prefix = None if facts is None else facts.prefix
    return next((n for n in names if getattr(cfg.method, n) and n.startswith(prefix or "-")), None)


def problems(cfg: RunConfig) -> Iterator[str]:
    """Contradictions of these keys: a sentence each."""
    given = [name for name in METHOD_OPTIMIZERS if getattr(cfg.method, name)]
    if len(given) > 1:
        yield f"{' and '.join(given)} were given. A run has one optimizer: keep one."
        return
    facts = chosen(cfg)
    if facts is None:
        return
    name, optim = facts.name, str(cfg.trainer.optim)
    if optim not in facts.optims:
        yield (
            f"{name} and optim: {optim} were given. Use optim: {facts.optims[0]}, or leave {name}"
            " out."
        )
    if not facts.lora and cfg.method.finetuning_type in ("lora", "oft"):
        yield (
            f"{name} saves memory where whole matrices are trained; this run's finetuning_type is"
            f" {cfg.method.finetuning_type}. Use full or freeze, or leave {name} out."
        )
    if cfg.method.loraplus_lr_ratio is not None:
        yield f"{name} and loraplus_lr_ratio were given. A run has one optimizer: keep one."
    if cfg.trainer.deepspeed is not None:
        yield (
            f"{name} needs whole matrices, and DeepSpeed flattens parameters into one buffer. "
            "Leave deepspeed out"
            + ("; sharding: fsdp2 shards the run." if facts.fsdp2 is None else ".")
        )
    if facts.fsdp2 is not None and cfg.parallel.sharding == "fsdp2":
        yield f"{name}: {facts.fsdp2}. Use sharding: ddp, or use_muon."
    if cfg.memory.optimizer_placement == "host":
        yield f"{name} cannot keep its states on the host. Leave optimizer_placement out."
    if cfg.memory.optimizer_overlap or cfg.memory.offload_gradients is True:
        yield (
            f"{name} needs its gradients on the GPU. Leave optimizer_overlap and offload_gradients"
            " out."
        )
    layerwise = in_backward(cfg)
    if layerwise is not None:
        if cfg.trainer.gradient_accumulation_steps > 1:
            yield (
                f"{layerwise} updates a matrix as soon as its gradient is there, so gradients "
                "cannot be accumulated. Set gradient_accumulation_steps: 1, or leave "
                f"{layerwise} out."
            )
        if cfg.trainer.fp16:
            yield f"{layerwise} needs unscaled gradients, and those of fp16 are scaled. Use bf16."
        if cfg.parallel.sequence_parallel_size not in (1, "auto"):
            yield layerwise_refusal(layerwise)
    if cfg.method.badam_mode == "ratio" and cfg.method.badam_start_block is not None:
        yield "badam_start_block is for badam_mode: layer. Leave it out."
    if cfg.method.use_badam and (
        cfg.method.badam_mode == "layer"
        and cfg.method.badam_switch_mode == "fixed"
        and cfg.method.badam_start_block is None
    ):
        yield "badam_switch_mode: fixed trains one layer. Give badam_start_block."


def layerwise_refusal(layerwise: str) -> str:
    """Why a run of several processes cannot update in the backward pass."""
    return (
        f"{layerwise} updates a matrix before its gradient is reduced over devices, so each "
        f"device would end up with different weights. Leave {layerwise} out with more than one "
        "process."
    )
