"""Which parameters are trained: all of them, some layers (freeze), or adapters (LoRA and its kin,
by peft).
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longfactory.errors import UserError
from longfactory.sp import hf
from longfactory.sp.text_model import Idle, decoder_layers, idle

log = logging.getLogger("longfactory")


def apply_finetuning(
    model: Any, method: Any, model_args: Any, *, is_trainable: bool = True, resized: bool = False
) -> Any:
    """Makes the model trainable as `finetuning_type` says and returns it (wrapped by peft for
    LoRA).

    What a row of text does not pass through (towers, projectors) is frozen whatever
    `finetuning_type` says: it has no gradient.

    Args:
        method: the finetuning arguments (`finetuning_type`, `lora_*`, `freeze_*`, ...).
        model_args: the model arguments (`adapter_name_or_path`).
        resized: the vocabulary grew, so that embeddings must be trained and saved beside an
            adapter.
    """
    kind = method.finetuning_type
    adapters = _names(model_args.adapter_name_or_path)
    if adapters and kind != "lora":
        raise UserError(f"adapter_name_or_path needs finetuning_type: lora, not {kind}.")
    if kind == "full":
        model.requires_grad_(is_trainable)
    elif kind == "freeze":
        _freeze(model, method)
    elif kind == "lora":
        model = _lora(model, method, adapters, is_trainable, resized)
    else:
        raise UserError(f"finetuning_type: {kind} is not supported. Use full, freeze or lora.")
    freeze_idle(model)
    return model


def freeze_idle(model: nn.Module) -> Idle:
    """Freezes what a row of text does not pass through, adapters in it too, and returns its names
    in the unwrapped model.
    """
    inner = hf.unwrap(model)
    parts = idle(inner)
    for name, p in inner.named_parameters():
        if name in parts.parameters:
            p.requires_grad_(False)
    return parts


def describe_trained(model: nn.Module) -> list[tuple[int, str]]:
    """What is trained and what is not, as (level of logging, line)."""
    inner = hf.unwrap(model)
    trainable, total = count_parameters(model)
    lines = [
        (
            logging.INFO,
            (
                f"Trainable parameters: {trainable:,} of {total:,}"
                f" ({100 * trainable / max(total, 1):.2f} %)"
            ),
        )
    ]
    if (parts := idle(inner)).modules:
        numbers = count_parameters(inner, parts.parameters)[1]
        names = ", ".join(parts.modules[:6]) + (
            f" and {len(parts.modules) - 6} more" if len(parts.modules) > 6 else ""
        )
        line = (
            f"Text does not pass through {names}: {numbers:,} parameters are frozen and are saved"
            " as they were loaded."
        )
        lines.append((logging.INFO, line))
    adapted = Counter(name.rsplit(".", 1)[-1] for name, m in model.named_modules() if _adapted(m))
    if adapted:
        places = ", ".join(f"{count} x {name}" for name, count in sorted(adapted.items()))
        lines.append((logging.INFO, f"Adapters: {sum(adapted.values())} ({places})"))
        experts = {
            n
            for n, _ in inner.named_parameters()
            if re.search(r"\bexperts\b", n) and n not in parts.parameters
        }
        bare = {
            n for n in experts if "lora_" not in n and not _adapted(inner.get_submodule(_owner(n)))
        }
        if bare:
            share = 100 * count_parameters(inner, bare)[1] / max(total, 1)
            line = (
                f"The routed experts carry no adapter: {share:.0f} % of the weights stay as they"
                " are. LoRA reaches linear layers alone."
            )
            lines.append((logging.WARNING, line))
    return lines


def _owner(parameter: str) -> str:
    """The name of the module that a parameter belongs to; of a layer that peft wrapped, that of the
    wrapper.
    """
    return parameter.rpartition(".")[0].removesuffix(".base_layer")


def _adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and bool(module.active_adapters)


def cast_trainable(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """fp32 master weights: an update of 1e-5 is lost in a bf16 weight."""
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = p.data.to(dtype)


def count_parameters(
    model: nn.Module, names: frozenset[str] | set[str] | None = None
) -> tuple[int, int]:
    """(trainable, all), of `names` alone where given. Four-bit weights count as the numbers that
    they stand for.
    """
    trainable = total = 0
    for name, p in model.named_parameters():
        if names is not None and name not in names:
            continue
        n = getattr(p, "ds_numel", p.numel())  # under ZeRO-3 a weight is empty between its uses
        if p.__class__.__name__ == "Params4bit":
            n *= 2 * p.element_size() if hasattr(p, "element_size") else 2
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def _names(value: Any) -> list[str]:
    if not value:
        return []
    return (
        [v.strip() for v in value.split(",") if v.strip()]
        if isinstance(value, str)
        else list(value)
    )


def _freeze(model: nn.Module, method: Any) -> None:
    prefix, layers = decoder_layers(model)
    parts = idle(hf.unwrap(model))
    n, count = len(layers), method.freeze_trainable_layers
    if count == 0 and not (_names(method.freeze_extra_modules) and not method.use_llama_pro):
        raise UserError(
            "freeze_trainable_layers: 0 trains nothing. Give the number of layers, or"
            " freeze_extra_modules."
        )
    if method.use_llama_pro:
        if count < 0 or n % count:
            raise UserError(
                f"use_llama_pro trains every ({n}/{count})th layer: {n} layers are not divisible by"
                f" freeze_trainable_layers: {count}."
            )
        stride = n // count
        chosen = range(stride - 1, n, stride)
    else:
        chosen = range(max(0, n - count), n) if count >= 0 else range(min(n, -count))
    names = _names(method.freeze_trainable_modules)
    layer_names = {
        part for layer in layers for name, _ in layer.named_parameters() for part in name.split(".")
    }
    unknown = [m for m in names if m != "all" and m not in layer_names]
    if unknown:
        raise UserError(
            f"freeze_trainable_modules: {', '.join(unknown)} not found in a decoder layer. It has:"
            f" {', '.join(sorted(layer_names))}."
        )
    extra = _names(method.freeze_extra_modules)
    outside = [name for name, _ in model.named_parameters() if not name.startswith(prefix + ".")]
    others = {part for name in outside if name not in parts for part in name.split(".")}
    unpassed = {part for name in outside if name in parts for part in name.split(".")} - others
    if unreached := [m for m in extra if m in unpassed]:
        raise UserError(
            f"freeze_extra_modules: {', '.join(unreached)} cannot be trained on text: it lies in"
            f" {', '.join(parts.modules)}, which text does not pass through."
        )
    unknown = [m for m in extra if m not in others]
    if unknown:
        raise UserError(
            f"freeze_extra_modules: {', '.join(unknown)} not found outside the decoder layers."
            f" There are: {', '.join(sorted(others))}."
        )
    picked = {f"{prefix}.{i}." for i in chosen}
    for name, p in model.named_parameters():
        in_layer = any(name.startswith(s) for s in picked) and (
            "all" in names or any(m in name.split(".") for m in names)
        )
        p.requires_grad_(in_layer or any(m in name.split(".") for m in extra))


def linear_names(model: nn.Module) -> list[str]:
    """Names for peft of every linear layer that text passes through, but the output layer: what
    `lora_target: all` means.

    A router that is a linear layer and gives more than its product (that of Llama 4) takes no
    adapter and is left out.

    The last part of a layer's name, as q_proj, where it stands for linear layers alone. A number,
    or a part that other modules end in too, gets what stands before it: peft takes the `0` of
    `ffn.0` for every first layer of the decoder.
    """
    inner = hf.unwrap(model)
    parts, head = idle(inner), inner.get_output_embeddings()
    linear: list[str] = []
    others: list[str] = []
    for name, module in inner.named_modules():
        if not name or name in parts:
            continue
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ in (*QUANTIZED, "Conv1D")
        target = (
            is_linear
            and not _gives_more(module)
            and module is not head
            and not re.search(r"lm_head|score", name)
        )
        (linear if target else others).append(name)
    taken = {end for name in others for end in _ends(name)}
    return sorted({_first_clear_end(name, taken) for name in linear})


QUANTIZED = ("Linear4bit", "Linear8bitLt")


def _gives_more(module: nn.Module) -> bool:
    """Whether a linear layer with a forward of its own does not give one tensor of `out_features`
    numbers a token.

    It is tried on the meta device. What cannot be tried there is taken for an ordinary layer.
    """
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if not own or type(module).__name__ in QUANTIZED:
        return False
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    held = {
        name: torch.empty(shapes[name], device="meta")
        for name, _ in module.named_parameters()
        if name in shapes
    }
    try:
        out = torch.func.functional_call(
            module, held, (torch.empty(3, module.in_features, device="meta"),)
        )
    except Exception:
        return False
    return not isinstance(out, torch.Tensor) or out.shape != (3, module.out_features)


def _ends(name: str) -> list[str]:
    """`h.0.ffn.2` -> `2`, `ffn.2`, `0.ffn.2`, `h.0.ffn.2`: what peft finds a module by."""
    words = name.split(".")
    return [".".join(words[-n:]) for n in range(1, len(words) + 1)]


def _first_clear_end(name: str, taken: set[str]) -> str:
    """The shortest end of a module's name that begins with a word, not a number, and is no other
    module's; else the whole name.
    """
    clear = (end for end in _ends(name) if end not in taken and not end.split(".")[0].isdigit())
    return next(clear, name)


def _named_by(target: str, names: list[str]) -> list[str]:
    """The modules that peft finds under a target: by its leaf name, or by the end of its whole
    name.
    """
    return [n for n in names if n == target or n.endswith("." + target)]


def _refuse_unknown(targets: list[str], model: Any, parts: Idle) -> None:
    """Refuses targets of LoRA that are nowhere, or only where text does not pass.

    Raises:
        UserError: with the linear layers that there are.
    """
    names = [name for name, _ in model.named_modules()]
    found = {t: _named_by(t, names) for t in targets}
    there = f"Linear layers: {', '.join(linear_names(model))}."
    if unknown := [t for t, at in found.items() if not at]:
        raise UserError(
            f"lora_target or additional_target: {', '.join(unknown)} not found in the model."
            f" {there}"
        )
    if unpassed := [t for t, at in found.items() if all(n in parts for n in at)]:
        raise UserError(
            f"lora_target or additional_target: {', '.join(unpassed)} cannot be trained on text: it"
            f" lies in {', '.join(parts.modules)}, which text does not pass through. {there}"
        )


def _refuse_routers(targets: list[str], model: Any) -> None:
    """Refuses targets that PEFT takes for linear layers and cannot run.

    Raises:
        UserError: with the linear layers that there are.
    """
    names = [name for name, _ in model.named_modules()]
    routers = [
        t for t in targets if any(_gives_more(model.get_submodule(n)) for n in _named_by(t, names))
    ]
    if routers:
        raise UserError(
            f"lora_target: {', '.join(routers)} gives more than the product of a linear layer, as"
            " routers of experts do, and takes no adapter. Linear layers:"
            f" {', '.join(linear_names(model))}."
        )


def _excluded(targets: list[str], model: Any, parts: Idle) -> str | None:
    """peft's `exclude_modules`, a pattern of whole names, where a target's leaf name also stands in
    a part that text does not pass.
    """
    names = [name for name, _ in model.named_modules()]
    if not any(n in parts for t in targets for n in _named_by(t, names)):
        return None
    return "(" + "|".join(re.escape(m) for m in parts.modules) + r")(\..*)?"


def _whole_where_unclear(targets: list[str], model: Any, parts: Idle) -> list[str]:
    """`modules_to_save` has no exclusion: a leaf name that also stands in a part that text does not
    pass is written out.
    """
    names = [name for name, _ in model.named_modules()]
    out: list[str] = []
    for target in targets:
        at = _named_by(target, names)
        out += [n for n in at if n not in parts] if any(n in parts for n in at) else [target]
    return out


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """While open, the host's random numbers are the same ones every time; afterwards those go on
    that would have come.

    PiSSA takes the adapter's first values out of the base weights, by a decomposition that begins
    at random. Whoever loads the adapter takes them out again: they must be the same, or the model
    is another.
    """
    # of all devices it would touch every GPU of the machine
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def load_adapter(
    model: Any, path: str, *, key: str = "adapter_name_or_path", **options: Any
) -> Any:
    """`PeftModel.from_pretrained`.

    Args:
        key: where the user named it, for what is said if it is not there.
        options: passed on.
    Raises:
        UserError: there is no adapter in the folder or under that name, or it was trained on
            another model.
    """
    from peft import PeftModel

    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: {path} holds no adapter_config.json. Give the folder that a LoRA run has"
            " written."
        )
    try:
        with same_draws(), warnings.catch_warnings():
            # Else PEFT makes up what an adapter lacks.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(
                model, str(folder) if folder.exists() else path, **options
            )
    except UserWarning as warning:
        names = re.findall(r"'([^']+)'", str(warning))
        raise UserError(
            f"{key}: {path} lacks {len(names)} tensors that its adapter_config.json asks for in"
            f" {model.config.name_or_path}, or has them under other names: {', '.join(names[:3])}."
            " It is damaged, or was trained on another model."
        ) from warning
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        words = " ".join((str(e).strip().splitlines() or [type(e).__name__])[:2])
        if folder.exists():
            raise UserError(
                f"{key}: {path} does not fit {model.config.name_or_path}: {words}"
            ) from e
        raise UserError(
            f"{key}: there is no folder {path}, and the hub gave no adapter of that name: {words}"
        ) from e


def _lora(model: Any, method: Any, adapters: list[str], is_trainable: bool, resized: bool) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    if getattr(model, "is_quantized", False):
        model.requires_grad_(False)
    resume: str | None = None
    if adapters:
        if len(adapters) > 1 and getattr(model, "is_quantized", False):
            raise UserError(
                "A quantised model takes one adapter in adapter_name_or_path: merging several needs"
                " full weights."
            )
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
    parts = idle(model)
    saved = _names(method.additional_target) or None
    if saved is None and resized:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        grown = [name for name, m in model.named_modules() if m is head or m is embedding]
        others = [name for name, _ in model.named_modules() if name not in grown]
        # Of modules to save peft takes each whose name ends in these letters, be it in the middle
        # of a word.
        leaves = {name: name.rsplit(".", 1)[-1] for name in grown}
        saved = sorted(
            {
                name if any(o.endswith(leaf) for o in others) else leaf
                for name, leaf in leaves.items()
            }
        )
    linear = ", ".join(linear_names(model))  # afterwards they are wrapped
    _refuse_unknown([*targets, *(saved or [])], model, parts)
    _refuse_routers(targets, model)
    saved = _whole_where_unclear(saved, model, parts) if saved else None
    start: bool | str = True
    if method.pissa_init:
        start = f"pissa_niter_{method.pissa_iter}" if method.pissa_iter > 0 else "pissa"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=method.lora_rank,
        target_modules=targets,
        exclude_modules=_excluded(targets, model, parts),
        lora_alpha=method.lora_alpha or method.lora_rank * 2,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        modules_to_save=saved,
        init_lora_weights=start,
    )
    try:
        with same_draws() if method.pissa_init else contextlib.nullcontext():
            return get_peft_model(model, config)
    except ValueError as error:  # of a module that is no layer of one matrix
        raise UserError(
            f"lora_target: {', '.join(targets)} cannot all take an adapter:"
            f" {' '.join(str(error).split())[:300]} Linear layers: {linear}."
        ) from error
