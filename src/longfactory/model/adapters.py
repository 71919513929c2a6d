"""Which parameters are trained: all of them, some layers (freeze), or adapters (LoRA and its kin, by peft)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longfactory.errors import UserError


def apply_finetuning(model: Any, method: Any, model_args: Any, *, is_trainable: bool = True, resized: bool = False) -> Any:
    """Makes the model trainable as `finetuning_type` says and returns it (wrapped by peft for LoRA).

    Args:
        method: the finetuning arguments (`finetuning_type`, `lora_*`, `freeze_*`, ...).
        model_args: the model arguments (`adapter_name_or_path`).
        resized: the vocabulary grew, so that embeddings must be trained and saved beside an adapter.
    """
    kind = method.finetuning_type
    adapters = _names(model_args.adapter_name_or_path)
    if adapters and kind != "lora":
        raise UserError(f"adapter_name_or_path needs finetuning_type: lora, not {kind}.")
    if kind == "full":
        model.requires_grad_(is_trainable)
        return model
    if kind == "freeze":
        _freeze(model, method)
        return model
    if kind == "lora":
        return _lora(model, method, adapters, is_trainable, resized)
    raise UserError(f"finetuning_type: {kind} is not supported. Use full, freeze or lora.")


def cast_trainable(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """fp32 master weights: an update of 1e-5 is lost in a bf16 weight."""
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = p.data.to(dtype)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all). Four-bit weights count as the numbers that they stand for."""
    trainable = total = 0
    for p in model.parameters():
        n = getattr(p, "ds_numel", p.numel())  # under ZeRO-3 a weight is empty between its uses
        if p.__class__.__name__ == "Params4bit":
            n *= 2 * p.element_size() if hasattr(p, "element_size") else 2
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def _names(value: Any) -> list[str]:
    if not value:
        return []
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else list(value)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder layers: the longest ModuleList of one layer type outside vision parts."""
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not re.search(r"vision|visual|audio|experts|lora", name)
            and (best is None or len(module) > len(best[1]))
        ):
            best = (name, module)
    if best is None:
        raise UserError(f"{type(model).__name__} has no list of decoder layers; finetuning_type: freeze cannot be applied to it.")
    return best


def _freeze(model: nn.Module, method: Any) -> None:
    prefix, layers = decoder_layers(model)
    n, count = len(layers), method.freeze_trainable_layers
    if count == 0 and not (_names(method.freeze_extra_modules) and not method.use_llama_pro):
        raise UserError("freeze_trainable_layers: 0 trains nothing. Give the number of layers, or freeze_extra_modules.")
    if method.use_llama_pro:
        if count < 0 or n % count:
            raise UserError(
                f"use_llama_pro trains every ({n}/{count})th layer: {n} layers are not divisible by freeze_trainable_layers: {count}."
            )
        stride = n // count
        chosen = range(stride - 1, n, stride)
    else:
        chosen = range(max(0, n - count), n) if count >= 0 else range(min(n, -count))
    names = _names(method.freeze_trainable_modules)
    layer_names = {part for layer in layers for name, _ in layer.named_parameters() for part in name.split(".")}
    unknown = [m for m in names if m != "all" and m not in layer_names]
    if unknown:
        raise UserError(
            f"freeze_trainable_modules: {', '.join(unknown)} not found in a decoder layer. It has: {', '.join(sorted(layer_names))}."
        )
    extra = _names(method.freeze_extra_modules)
    others = {part for name, _ in model.named_parameters() if not name.startswith(prefix + ".") for part in name.split(".")}
    unknown = [m for m in extra if m not in others]
    if unknown:
        raise UserError(
            f"freeze_extra_modules: {', '.join(unknown)} not found outside the decoder layers. There are: {', '.join(sorted(others))}."
        )
    picked = {f"{prefix}.{i}." for i in chosen}
    for name, p in model.named_parameters():
        in_layer = any(name.startswith(s) for s in picked) and ("all" in names or any(m in name.split(".") for m in names))
        p.requires_grad_(in_layer or any(m in name.split(".") for m in extra))


def linear_names(model: nn.Module, exclude: Iterable[nn.Module] = ()) -> list[str]:
    """Leaf names of every linear layer but the output layer and vision parts: what `lora_target: all` means."""
    skip = {id(m) for m in exclude}
    found = set()
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Linear8bitLt", "Conv1D")
        if linear and id(module) not in skip and not re.search(r"vision|visual|audio|projector|lm_head|score", name):
            found.add(name.rsplit(".", 1)[-1])
    return sorted(found)


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """While open, the host's random numbers are the same ones every time; afterwards those go on that would have come.

    PiSSA takes the adapter's first values out of the base weights, by a decomposition that begins at random. Whoever loads the adapter
    takes them out again: they must be the same, or the model is another.
    """
    with torch.random.fork_rng(devices=[]):  # of all devices it would touch every GPU of the machine
        torch.default_generator.manual_seed(0)
        yield


def load_adapter(model: Any, path: str, *, key: str = "adapter_name_or_path", **options: Any) -> Any:
    """`PeftModel.from_pretrained`.

    Args:
        key: where the user named it, for what is said if it is not there.
        options: passed on.
    Raises:
        UserError: there is no adapter in the folder or under that name, or it was trained on another model.
    """
    from peft import PeftModel

    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{key}: {path} holds no adapter_config.json. Give the folder that a LoRA run has written.")
    try:
        with same_draws():
            return PeftModel.from_pretrained(model, str(folder) if folder.exists() else path, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        words = " ".join((str(e).strip().splitlines() or [type(e).__name__])[:2])
        if folder.exists():
            raise UserError(f"{key}: {path} does not fit {model.config.name_or_path}: {words}") from e
        raise UserError(f"{key}: there is no folder {path}, and the hub gave no adapter of that name: {words}") from e


def _lora(model: Any, method: Any, adapters: list[str], is_trainable: bool, resized: bool) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    if getattr(model, "is_quantized", False):
        model.requires_grad_(False)
    resume: str | None = None
    if adapters:
        if len(adapters) > 1 and getattr(model, "is_quantized", False):
            raise UserError("A quantised model takes one adapter in adapter_name_or_path: merging several needs full weights.")
        last = adapters.pop() if not method.create_new_adapter and is_trainable else None
        for path in adapters:  # all but the last are merged into the weights
            model = load_adapter(model, path).merge_and_unload()
        resume = last
    if resume is not None:
        return load_adapter(model, resume, is_trainable=is_trainable)
    if not is_trainable:
        return model
    targets: Any = _names(method.lora_target)
    if targets == ["all"]:
        targets = linear_names(model)
    saved = _names(method.additional_target) or None
    if saved is None and resized:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        saved = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is head or m is embedding})
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    unknown = [t for t in [*targets, *(saved or [])] if t not in leaves and not any(n.endswith(t) for n, _ in model.named_modules())]
    if unknown:
        raise UserError(
            f"lora_target or additional_target: {', '.join(unknown)} not found in the model. "
            f"Linear layers: {', '.join(linear_names(model))}."
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=method.lora_rank,
        target_modules=targets,
        lora_alpha=method.lora_alpha or method.lora_rank * 2,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        modules_to_save=saved,
        init_lora_weights=(f"pissa_niter_{method.pissa_iter}" if method.pissa_iter > 0 else "pissa") if method.pissa_init else True,
    )
    with same_draws() if method.pissa_init else contextlib.nullcontext():
        return get_peft_model(model, config)
