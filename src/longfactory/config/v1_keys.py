"""Files for LLaMA-Factory's rewritten engine (v1, its `src/llamafactory/v1`), read as runs: what
their keys are called here, and v1's own defaults where ours are others.

Keys of ours beside them (`stage=dpo`, `sequence_parallel_size=8`) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longfactory.config.fields import plain
from longfactory.errors import ConfigError

KEYS = frozenset(
    {
        *("model", "model_class", "custom_chat_template", "train_dataset", "sample_backend"),
        *("kernel_config", "dist_config", "quant_config", "peft_config", "init_config"),
        *("optim_config", "lr_scheduler_config", "micro_batch_size", "global_batch_size"),
        *("batching_strategy", "enable_activation_checkpointing"),
    }
)
"""Keys of v1 that no other file has; two of them make a file v1's."""
ENOUGH = 2

NAMES = {
    "model": "model_name_or_path",
    "train_dataset": "dataset",
    "micro_batch_size": "per_device_train_batch_size",
    "sample_backend": "infer_backend",
    "dist_timeout": "ddp_timeout",
}
"""Keys that have another name here."""
DEFAULTS: dict[str, Any] = {
    "stage": "sft",
    "finetuning_type": "full",
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "logging_steps": 1,
    "bf16": True,
    "media_dir": ".",
}
"""What v1 does where its file says nothing, and LLaMA-Factory's usual keys another thing. It opens
media from the working folder.
"""
LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target",
    "modules_to_save": "additional_target",
    **{
        name: name
        for name in (
            *("use_rslora", "use_dora", "adapter_name_or_path", "export_dir", "export_size"),
            *("export_hub_model_id", "infer_dtype", "export_legacy_format"),
        )
    },
}
LORA_DEFAULTS = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target": "all"}
FREEZE = {
    name: name
    for name in ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
}
MUON = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}
"""Of v1's Muon, what is fixed here."""

NO_EFFECT = {
    "dist_config": ("ep_size", "ep_dispatcher"),
    "peft_config": ("cast_trainable_params_to_fp32",),
    "kernel_config": ("include_kernels", "chunk_size"),
}
"""Entries of parts that change no result here: experts are sharded like all other weights, what
trains has float32 masters where the run asks for them, and kernels are chosen when a run starts."""
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""v1's values of flash_attn: each computes the same attention, as the kernel chosen here does."""
LIGER, AUTO = "liger_kernel", "auto"

Part = Mapping[str, Any]


def is_v1(values: Mapping[str, Any]) -> bool:
    """Whether a file has v1's keys."""
    return sum(name in KEYS for name in values) >= ENOUGH


def translated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A v1 file's keys under the names that they have here, and what the user should know.

    Raises:
        ConfigError: a part asks for what there is not, a sentence each.
    """
    out: dict[str, Any] = {}
    notes = [
        "This is a file for LLaMA-Factory's engine v1: its keys are read under their usual names."
    ]
    problems: list[str] = []
    parts: dict[str, Callable[[Part, dict[str, Any]], Iterator[str]]] = {
        "peft_config": _peft,
        "quant_config": _quantisation,
        "dist_config": _sharding,
        "optim_config": _optimizer,
        "kernel_config": _kernels,
        "lr_scheduler_config": _schedule,
    }
    for name, value in values.items():
        if name in parts:
            if value is None:
                continue
            if not isinstance(value, Mapping) or "name" not in value:
                problems.append(f"{name}: got {plain(str(value))}, expected a mapping with name.")
                continue
            problems += parts[name](value, out)
            if unused := [entry for entry in NO_EFFECT.get(name, ()) if entry in value]:
                notes.append(f"{name}: {', '.join(unused)}: no effect here.")
            if name == "kernel_config" and (others := _other_kernels(value)):
                notes.append(
                    f"kernel_config: name: {', '.join(others)}: no effect here: kernels are chosen"
                    " when the run starts."
                )
        elif name == "flash_attn":
            if value is not None and str(value) not in ATTENTION:
                problems.append(
                    f"flash_attn: got {plain(str(value))}, expected one of {', '.join(ATTENTION)}."
                )
            elif value is not None:
                notes.append(
                    f"flash_attn: {value}: no effect here: the fastest exact kernel is chosen"
                    " (attention_backend names one)."
                )
        elif name == "init_config":
            notes.append("init_config has no effect: how weights are loaded follows from sharding.")
        elif name == "batching_workers":
            out["dataloader_num_workers"] = value
        elif name == "model_class":
            if value != "llm":
                problems.append(
                    f"model_class: {plain(str(value))} is refused: language models train here."
                )
        elif name == "batching_strategy":
            _batching(value, out, notes, problems)
        elif name == "enable_activation_checkpointing":
            out["gradient_checkpointing"] = value
        elif name == "custom_chat_template":
            if value is not None:
                problems.append(
                    "custom_chat_template is refused: write it into the model's folder, as"
                    " chat_template.jinja."
                )
        elif name == "global_batch_size":
            problems.append(
                "global_batch_size is refused: it divides by the number of devices. Give"
                " gradient_accumulation_steps (global_batch_size / micro_batch_size / data-parallel"
                " size)."
            )
        elif name in ("save_steps", "save_epochs"):
            _saving(name, value, out, problems)
        else:
            out[NAMES.get(name, name)] = value
    if problems:
        raise ConfigError("\n".join(problems))
    if "save_steps" not in values and "save_epochs" not in values:
        out.setdefault("save_strategy", "no")
    return {**DEFAULTS, **out}, notes


def _rest(part: str, value: Part, known: Mapping[str, Any]) -> Iterator[str]:
    """A problem for each entry of a part that is not read."""
    for name in value:
        if name != "name" and name not in known:
            yield f"{part}: there is no entry {plain(str(name))}; known are {', '.join(known)}."


def _peft(value: Part, out: dict[str, Any]) -> Iterator[str]:
    kinds = {"lora": LORA, "freeze": FREEZE}
    kind = value["name"]
    if kind not in kinds:
        yield f"peft_config: name: {plain(str(kind))} is refused. Use lora or freeze."
        return
    out["finetuning_type"] = kind
    if kind == "lora":
        out.update(LORA_DEFAULTS)
    known = kinds[kind]
    out.update({known[n]: v for n, v in value.items() if n in known and v is not None})
    yield from _rest("peft_config", value, {**known, "cast_trainable_params_to_fp32": None})


def _quantisation(value: Part, out: dict[str, Any]) -> Iterator[str]:
    if value["name"] != "bnb":
        yield f"quant_config: name: {plain(str(value['name']))} is refused. Use bnb."
    out["quantization_bit"] = value.get("quantization_bit", 4)
    yield from _rest("quant_config", value, {"quantization_bit": None})


def _sharding(value: Part, out: dict[str, Any]) -> Iterator[str]:
    kind = value["name"]
    if kind == "deepspeed":
        out["deepspeed"] = value.get("config_file")
        yield from _rest("dist_config", value, {"config_file": None})
        return
    if kind not in ("fsdp2", "fsdpturbo"):
        yield f"dist_config: name: {plain(str(kind))} is refused. Use fsdp2 or deepspeed."
        return
    out["sharding"] = "fsdp2"
    if value.get("dcp_path") is not None:
        yield (
            "dist_config: dcp_path is refused: checkpoints in torch's distributed format are not"
            " read. Give model_name_or_path a folder of safetensors."
        )
    # Experts are sharded like all other weights: where they lie changes no result.
    known = dict.fromkeys(("dcp_path", "ep_size", "ep_dispatcher"))
    yield from _rest("dist_config", value, known)


def _optimizer(value: Part, out: dict[str, Any]) -> Iterator[str]:
    kind = value["name"]
    if kind not in ("muon", "adamw"):
        yield f"optim_config: name: {plain(str(kind))} is refused. Use muon, or leave it out."
        return
    out["use_muon"] = kind == "muon"
    for name, key in (("wd", "weight_decay"), ("adamw_eps", "adam_epsilon")):
        if name in value:
            out[key] = value[name]
    if "lr" in value:
        yield "optim_config: lr is refused: give learning_rate, which the whole model has."
    if "adamw_betas" in value:
        out["adam_beta1"], out["adam_beta2"] = value["adamw_betas"]
    for name, fixed in MUON.items():
        if value.get(name, fixed) != fixed:
            yield f"optim_config: {name}: {plain(str(value[name]))} is refused: it is {fixed} here."
    known = {**MUON, **dict.fromkeys(("wd", "adamw_eps", "adamw_betas", "lr"))}
    yield from _rest("optim_config", value, known)


def _kernels(value: Part, out: dict[str, Any]) -> Iterator[str]:
    """Kernels are chosen here, but Liger's, which are asked for by name."""
    if LIGER in _names(value):
        out["enable_liger_kernel"] = True
    yield from _rest("kernel_config", value, dict.fromkeys(NO_EFFECT["kernel_config"]))


def _names(value: Part) -> list[str]:
    return [name.strip() for name in str(value["name"]).split(",")]


def _other_kernels(value: Part) -> list[str]:
    """The kernels that a file names, but Liger's and what v1 would choose."""
    return [plain(name) for name in _names(value) if name not in (LIGER, AUTO)]


def _schedule(value: Part, out: dict[str, Any]) -> Iterator[str]:
    out["lr_scheduler_type"] = value["name"]
    out["lr_scheduler_kwargs"] = {n: v for n, v in value.items() if n != "name"} or None
    yield from ()


def _batching(value: Any, out: dict[str, Any], notes: list[str], problems: list[str]) -> None:
    """Rows never have padding here; the dynamic ones are filled by tokens."""
    kind = str(value)
    if kind in ("dynamic_batching", "dynamic_padding_free"):
        out["packing"] = True
        notes.append(
            f"batching_strategy: {kind} is packing: true: rows are filled with whole samples up to"
            " cutoff_len."
        )
    elif kind not in ("normal", "padding_free"):
        problems.append(
            f"batching_strategy: {plain(str(value))} is refused. Use normal, padding_free,"
            " dynamic_batching or dynamic_padding_free."
        )


def _saving(name: str, value: Any, out: dict[str, Any], problems: list[str]) -> None:
    if name == "save_steps":
        out["save_strategy"] = "no" if value is None else "steps"
        if value is not None:
            out["save_steps"] = value
    elif value == 1:
        out["save_strategy"] = "epoch"
    elif value is not None:
        problems.append(f"save_epochs: {plain(str(value))} is refused: give save_steps, or 1.")
