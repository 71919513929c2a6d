"""Keys that a run does not read, or reads as something else than was written: told as notes."""

from __future__ import annotations

import os
from collections.abc import Callable

from longfactory.config import adapter_facts, optimizer_facts
from longfactory.config.run import RunConfig
from longfactory.config.stage_facts import STAGE_KEYS, STAGES
from longfactory.config.translate import OWN_KEYS

FREEZE_PARTS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
"""Of a model with images, in every finetuning_type."""


RAY_KEYS = ("ray_num_workers", "resources_per_worker", "placement_strategy", "ray_init_kwargs")


def idle(cfg: RunConfig, given: set[str]) -> list[str]:
    """Keys that were given and that this stage or method never reads, in a sentence each."""
    facts, kind = STAGES[cfg.method.stage], cfg.method.finetuning_type
    methods = optimizer_facts.METHOD_OPTIMIZERS.values()
    switched = [(f.name, f.prefix) for f in methods if f.prefix]
    rules: list[tuple[Callable[[str], bool], bool, str]] = [
        (
            lambda k: k.startswith(("lora_", "pissa_", "loraplus_")),
            kind == "lora",
            f"finetuning_type is {kind}",
        ),
        (
            lambda k: k == "additional_target",
            kind in adapter_facts.ADAPTERS,
            f"finetuning_type is {kind}",
        ),
        (lambda k: k.startswith("oft_"), kind == "oft", f"finetuning_type is {kind}"),
        (lambda k: k == "module_dropout", kind == "oft", f"finetuning_type is {kind}"),
        (
            lambda k: (
                k.startswith("freeze_")
                and k not in FREEZE_PARTS
                and not (k == "freeze_trainable_layers" and cfg.method.use_llama_pro)
            ),
            kind == "freeze",
            f"finetuning_type is {kind}",
        ),
        (
            lambda k: k in RAY_KEYS,
            os.environ.get("USE_RAY", "0").lower() in ("1", "true"),
            "USE_RAY=1 is not set, and Ray starts nothing",
        ),
        *(
            (
                (lambda k, start=prefix: k.startswith(start)),
                getattr(cfg.method, name),
                f"{name} is off",
            )
            for name, prefix in switched
        ),
        (lambda k: k == "buffer_size", cfg.data.streaming, "streaming is off"),
        (
            lambda k: k in ("quantization_method", "quantization_type", "double_quantization"),
            bool(cfg.model.quantization_bit or cfg.method.ref_model_quantization_bit),
            "quantization_bit is not given",
        ),
        (
            lambda k: k == "create_new_adapter",
            bool(cfg.model.adapter_name_or_path),
            "adapter_name_or_path is not given",
        ),
        (lambda k: k == "pissa_iter", cfg.method.pissa_init, "pissa_init is off"),
        (
            lambda k: k == "loraplus_lr_embedding",
            cfg.method.loraplus_lr_ratio is not None,
            "loraplus_lr_ratio is not given",
        ),
        (
            lambda k: k.startswith("profiler_"),
            cfg.output.enable_torch_profiler,
            "enable_torch_profiler is off",
        ),
        (
            lambda k: (
                k in ("default_system", "tool_format", "enable_thinking", "preserve_thinking")
            ),
            STAGES[cfg.method.stage].samples != "pt",
            f"stage is {cfg.method.stage}, whose texts go through no template",
        ),
        (
            lambda k: k == "max_length",
            cfg.trainer.do_predict,
            (
                "it is the length of generated answers, and the length of training samples is"
                f" cutoff_len ({cfg.data.cutoff_len})"
            ),
        ),
    ]
    found = []
    for name in sorted(given):
        reasons = [why for applies, read, why in rules if applies(name) and not read]
        if name in STAGE_KEYS and (reason := facts.unread(name, cfg.method)) is not None:
            reasons.append(reason)
        if reasons and not _is_default(cfg, name):
            found += [f"{name} has no effect: {why}." for why in reasons]
    return found


def _is_default(cfg: RunConfig, name: str) -> bool:
    groups = (cfg.model, cfg.data, cfg.method, cfg.parallel, cfg.generating, cfg.output)
    return (
        next((getattr(g, name) for g in groups if hasattr(g, name)), None) == OWN_KEYS[name].default
    )


def negative_steps(cfg: RunConfig) -> list[str]:
    """What transformers makes of a number below 0 in place of steps, in a sentence each."""
    what = {
        "logging": "the log has one line",
        "eval": "the run is evaluated once",
        "save": "one checkpoint is written",
    }
    found = []
    for name, words in what.items():
        steps = getattr(cfg.trainer, f"{name}_steps") or 0
        if getattr(cfg.trainer, f"{name}_strategy") == "steps" and steps < 0:
            found.append(f"{name}_steps: {steps:g}: {words}, after the last step.")
    return found
