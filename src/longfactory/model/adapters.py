"""Which parameters are trained: all of them, some layers (freeze), or adapters (LoRA and its kin,
by peft).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longfactory.config.adapter_facts import ADAPTERS, moves_base_weights
from longfactory.errors import UserError
from longfactory.model import experts
from longfactory.sp import hf, indexer, text_model, vision
from longfactory.sp.routers import is_router
from longfactory.sp.text_model import Idle, decoder_layers, idle

log = logging.getLogger("longfactory")

_OF_ADAPTER = re.compile(r"lora_|\.oft_R\.")
"""In the names of an adapter's own parameters."""


def apply_finetuning(
    model: Any, method: Any, model_args: Any, *, is_trainable: bool = True, resized: bool = False
) -> Any:
    """Makes the model trainable as `finetuning_type` says and returns it (wrapped by peft for
    LoRA and OFT).

    What a row of text does not pass through (towers, projectors) is frozen whatever
    `finetuning_type` says: it has no gradient.

    Args:
        method: the finetuning arguments (`finetuning_type`, `lora_*`, `freeze_*`, ...).
        model_args: the model arguments (`adapter_name_or_path`).
        is_trainable: False: adapters that are named are merged, and none is made.
        resized: the vocabulary grew, so that embeddings must be trained and saved beside an
            adapter.
    """
    kind = method.finetuning_type
    adapters = _names(model_args.adapter_name_or_path)
    if adapters and kind not in ADAPTERS:
        raise UserError(f"adapter_name_or_path needs finetuning_type: lora or oft, not {kind}.")
    if kind == "full":
        model.requires_grad_(is_trainable)
    elif kind == "freeze":
        _freeze(model, method)
    elif kind in ADAPTERS:
        model = _adapter(model, method, adapters, is_trainable, resized)
    else:
        raise UserError(f"finetuning_type: {kind} is not supported. Use full, freeze, lora or oft.")
    if method.train_routers is not None and is_trainable:
        _train_routers(model, method.train_routers)
    freeze_idle(model)
    _freeze_parts(model, method)
    return model


def frozen_parts(method: Any) -> frozenset[str]:
    """Of a model that images pass through, which of `tower`, `projector` and `language` the keys
    freeze.
    """
    if method.train_mm_proj_only:
        return frozenset({"tower", "language"})
    keys = {
        "tower": method.freeze_vision_tower,
        "projector": method.freeze_multi_modal_projector,
        "language": method.freeze_language_model,
    }
    return frozenset(part for part, frozen in keys.items() if frozen)


def _frozen_names(inner: Any, method: Any) -> set[str]:
    """Names of the parameters of an unwrapped model that the keys of its parts freeze; none of a
    model that text alone passes through.
    """
    if not text_model.enters_more_than_text(inner):
        return set()
    modules = vision.modules_of(inner)
    held = {
        part: {id(p) for m in modules[part] for p in m.parameters()}
        for part in ("tower", "projector")
    }
    held["projector"] |= {id(p) for p in vision.own_parameters(inner)}
    of: dict[str, set[int]] = {
        "projector": held["projector"],
        "tower": held["tower"] - held["projector"],
    }
    language = [text_model.decoder(inner), inner.get_output_embeddings()]
    of["language"] = {id(p) for m in language if m is not None for p in m.parameters()}
    frozen = set().union(*(of[part] for part in frozen_parts(method)))
    frozen |= {id(p) for p in vision.unused_parameters(inner)}
    return {n for n, p in inner.named_parameters(remove_duplicate=False) if id(p) in frozen}


def _freeze_parts(model: nn.Module, method: Any) -> None:
    """`freeze_vision_tower` and its kin.

    Raises:
        UserError: nothing is left to train.
    """
    inner = hf.unwrap(model)
    names = _frozen_names(inner, method)
    before = any(p.requires_grad for p in model.parameters())
    for name, p in inner.named_parameters(remove_duplicate=False):
        if name in names and "modules_to_save" not in name:
            p.requires_grad_(False)
    if before and not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"freeze_vision_tower, freeze_multi_modal_projector, freeze_language_model and"
            f" train_mm_proj_only leave nothing to train with finetuning_type:"
            f" {method.finetuning_type}. Set one of them to false."
        )


def _train_routers(model: nn.Module, trained: bool) -> None:
    """`train_routers`. Beside adapters PEFT holds the trained copies (`modules_to_save`)."""
    inner = hf.unwrap(model)
    routers = router_names(inner)
    if not routers:
        raise UserError(
            f"train_routers: {inner.config.model_type} has no routers of experts. Leave it out."
        )
    for name, p in inner.named_parameters():
        in_router = any(name.startswith(f"{router}.") for router in routers)
        if in_router and "original_module" not in name and ".base_layer." not in name:
            adapter = hasattr(model, "peft_config")
            p.requires_grad_(trained and (not adapter or "modules_to_save" in name))


def router_names(inner: nn.Module) -> list[str]:
    """Whole names of the routers that text passes through, as they are without adapters."""
    parts = idle(inner)
    names = {
        re.sub(r"\.(modules_to_save\.\w+|original_module|base_layer)\b", "", name)
        for name, module in inner.named_modules()
        if is_router(module) and name not in parts
    }
    return sorted(names)


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
    parts, choosers = idle(inner), set(indexer.indexers(inner))
    chooses = [name for name, m in inner.named_modules() if m in choosers]
    if others := [name for name in parts.modules if name not in chooses]:
        numbers = _inside(inner, others)
        names = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        line = (
            f"Text does not pass through {names}: {numbers:,} parameters are frozen and are saved"
            " as they were loaded."
        )
        lines.append((logging.INFO, line))
    if chooses:
        line = (
            f"{len(chooses)} indexers choose the keys of each query, and no gradient comes to them:"
            f" {_inside(inner, chooses):,} parameters are frozen."
        )
        lines.append((logging.INFO, line))
    lines += _describe_adapters(inner, parts)
    return lines


def _inside(inner: nn.Module, modules: list[str]) -> int:
    """Numbers in the parameters of these modules."""
    inside = tuple(f"{name}." for name in modules)
    names = {name for name, _ in inner.named_parameters() if name.startswith(inside)}
    return count_parameters(inner, names)[1]


def _describe_adapters(inner: nn.Module, parts: Idle) -> list[tuple[int, str]]:
    """How many numbers have an adapter and which matrices have none, as (level of logging,
    line).
    """
    adapted = {
        name if parameter == "weight" else f"{name}.{parameter}"
        for name, module in inner.named_modules()
        if _adapted(module)
        for name, parameter in [_adapted_parameter(name, module)]
    }
    if not adapted:
        return []
    numbers = 0
    bare: dict[str, int] = {}
    for name, p in inner.named_parameters():
        owner, _, own = name.replace(".base_layer", "").rpartition(".")
        matrix = owner if own == "weight" else f"{owner}.{own}"
        if _OF_ADAPTER.search(name) or "modules_to_save" in name:
            continue
        if matrix in adapted:
            numbers += _numbers_of(p)
        elif len(experts.whole_shape(p)) > 1 and not p.requires_grad and name not in parts:
            bare[matrix] = _numbers_of(p)
    total = count_parameters(inner)[1]
    total -= sum(_numbers_of(p) for n, p in inner.named_parameters() if _OF_ADAPTER.search(n))
    lines = [
        (
            logging.INFO,
            f"Adapters: {len(adapted)} ({_counted(adapted)}), on {numbers:,} of the model's"
            f" {total:,} parameters",
        )
    ]
    if bare:
        share = 100 * sum(bare.values()) / max(total, 1)
        lines.append(
            (
                logging.INFO,
                f"No adapter on: {_counted(bare)} ({share:.2f} % of the parameters). They stay as"
                " they are.",
            )
        )
    routers = {m for r in inner.modules() if is_router(r) for m in r.modules()}
    routing = {name.replace(".base_layer", "") for name, m in inner.named_modules() if m in routers}
    routed = [
        n
        for n in bare
        if re.search(r"\bexperts\b", n)
        and "bias" not in n
        and not routing & {n, n.rpartition(".")[0]}
    ]
    if routed:
        share = 100 * sum(bare[n] for n in routed) / max(total, 1)
        lines.append(
            (
                logging.WARNING,
                f"The routed experts carry no adapter: {share:.0f} % of the parameters stay as they"
                " are.",
            )
        )
    return lines


def _adapted_parameter(name: str, module: Any) -> tuple[str, str]:
    """The name that an adapted module has without adapters, and which of its parameters has the
    adapter.
    """
    parameter = module.parameter_name if experts.is_wrapper(module) else "weight"
    return name.replace(".base_layer", ""), parameter


def _counted(names: Iterable[str]) -> str:
    """`4 x experts.down_proj, 4 x q_proj`: of names in numbered layers, the part behind the number,
    as short as tells them apart.
    """
    ends = Counter(re.sub(r".*\.\d+\.(?=\D)", "", name) for name in names)
    leaves = Counter(end.rsplit(".", 1)[-1] for end in ends)

    def short(end: str) -> str:
        words = end.split(".")
        if leaves[words[-1]] > 1:
            return end
        return ".".join(words[-2:] if "experts" in words[-2:-1] else words[-1:])

    return ", ".join(f"{count} x {short(end)}" for end, count in sorted(ends.items()))


def _numbers_of(p: Any) -> int:
    """How many numbers a parameter stands for: four-bit weights hold two in a byte; under ZeRO-3 a
    parameter is empty between its uses.
    """
    n = int(getattr(p, "ds_numel", p.numel()))
    if p.__class__.__name__ == "Params4bit":
        n *= 2 * p.element_size() if hasattr(p, "element_size") else 2
    return n


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
        n = _numbers_of(p)
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


def unadapted(model: nn.Module, method: Any) -> Idle:
    """What gets no adapter: what rows do not pass through, and of a model that images pass through
    its frozen parts, and under `lora_target: all` the projector.

    Args:
        model: without adapters.
    """
    parts = idle(model)
    if not text_model.enters_more_than_text(model):
        return parts
    frozen = set(frozen_parts(method))
    named = method.oft_target if method.finetuning_type == "oft" else method.lora_target
    if _names(named) == ["all"]:
        frozen.add("projector")
    modules = vision.modules_of(model)
    projector = {id(m) for m in modules["projector"]}
    chosen = {id(m) for m in modules["projector"] if "projector" in frozen}
    if "tower" in frozen:
        for tower in modules["tower"]:
            inside = any(id(m) in projector for m in tower.modules())
            outermost = list(tower.children()) if inside else [tower]
            chosen |= {id(m) for m in outermost if id(m) not in projector}
    if "language" in frozen:
        chosen |= {id(text_model.decoder(model)), id(model.get_output_embeddings())}
    names = tuple(name for name, m in model.named_modules() if id(m) in chosen)
    inside_of = {
        n for n, _ in model.named_parameters() if any(n.startswith(m + ".") for m in names)
    }
    return Idle((*parts.modules, *names), parts.parameters | inside_of)


def linear_names(model: nn.Module, parts: Idle | None = None) -> list[str]:
    """Names for peft of every linear layer that text passes through, but the output layer: what
    `lora_target: all` means. `parts`: what gets none; by default what rows do not pass through.

    Routers are left out: what they choose would change with their adapter.

    The last part of a layer's name, as q_proj, where it stands for linear layers alone. A number,
    or a part that other modules end in too, gets what stands before it: peft takes the `0` of
    `ffn.0` for every first layer of the decoder.
    """
    inner = hf.unwrap(model)
    parts = idle(inner) if parts is None else parts
    head = inner.get_output_embeddings()
    in_routers = {m for router in inner.modules() if is_router(router) for m in router.modules()}
    linear: list[str] = []
    others: list[str] = []
    for name, module in inner.named_modules():
        if not name or name in parts:
            continue
        is_linear = isinstance(module, nn.Linear) or _holds_packed(module)
        is_linear = is_linear or type(module).__name__ == "Conv1D"
        target = (
            is_linear
            and module not in in_routers
            and not _gives_more(module)
            and module is not head
            and not re.search(r"lm_head|score", name)
        )
        (linear if target else others).append(name)
    taken = {end for name in others for end in _ends(name)}
    return sorted({_first_clear_end(name, taken) for name in linear})


QUANTIZED = ("Linear4bit", "Linear8bitLt", "HQQLinear", "QuantizedLinear")
"""Classes of bitsandbytes, hqq and AQLM."""


def _holds_packed(module: nn.Module) -> bool:
    """Whether a linear layer's weights are quantised; those of GPTQ and AWQ are known by `qweight`,
    since each kernel has a class of its own.
    """
    return type(module).__name__ in QUANTIZED or isinstance(
        getattr(module, "qweight", None), torch.Tensor
    )


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
    """Refuses targets of LoRA, and modules to save, that are nowhere, or only where text does not
    pass.

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
    frozen = ""
    if text_model.enters_more_than_text(model):
        frozen = " or which freeze_vision_tower and its kin freeze"
    if unpassed := [t for t, at in found.items() if all(n in parts for n in at)]:
        raise UserError(
            f"lora_target or additional_target: {', '.join(unpassed)} cannot be trained on text: it"
            f" lies in {', '.join(parts.modules)}, which text does not pass through{frozen}."
            f" {there}"
        )


@dataclasses.dataclass(frozen=True)
class Targets:
    """What PEFT is told to adapt.

    Attributes:
        modules: ends of names of linear layers (`target_modules`).
        parameters: ends of names of parameters (`target_parameters`): stacked experts, routers, and
            linear layers that PEFT would take for experts.
    """

    modules: list[str]
    parameters: list[str]


def lora_targets(model: Any, method: Any, parts: Idle) -> Targets:
    """What `lora_target` and `lora_experts` mean in this model.

    `all`: every linear map of the layers, routed experts included. A name may be that of a module,
    of a stacked parameter, or of a linear map of each expert as old checkpoints call it
    (gate_proj, up_proj, down_proj, w1, w2, w3). A router has an adapter where it is named.

    Args:
        model: a transformers model without adapters.
        method: the finetuning arguments.
        parts: what text does not pass through.
    Raises:
        UserError: a name is nowhere, or names half of a parameter.
    """
    named = _names(method.lora_target)
    maps = experts.expert_maps(model, parts)
    if named == ["all"]:
        every = linear_names(model, parts)
        modules = [name for name in every if not _refused_by_peft(name, model)]
        chosen = set(maps if method.lora_experts else ())
    else:
        modules, chosen = _resolved(named, model, method, maps)
        _refuse_unknown(modules, model, parts)
    taken = _taken_for_experts(modules, model)
    layers = [name for name, _ in model.named_modules() if name not in parts]
    for target in taken:
        chosen |= {f"{name}.weight" for name in _named_by(target, layers)}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return Targets(
        [target for target in modules if target not in taken], _clear_ends(chosen, parameters)
    )


def oft_targets(model: Any, method: Any, parts: Idle) -> Targets:
    """What `oft_target` means: linear layers alone, since PEFT rotates the inputs of modules and
    not of stacked parameters.

    Raises:
        UserError: a name is nowhere, or names routed experts or routers.
    """
    named = _names(method.oft_target)
    if named == ["all"]:
        modules = linear_names(model, parts)
        taken = _taken_for_experts(modules, model)
        return Targets([target for target in modules if target not in taken], [])
    found = lora_targets(model, dataclasses.replace(method, lora_target=tuple(named)), parts)
    if found.parameters:
        raise UserError(
            f"oft_target: PEFT's OFT has no adapters for parameters ({', '.join(found.parameters)})"
            ", as those of routed experts and routers are. Name other layers, or use"
            " finetuning_type: lora."
        )
    return found


def _resolved(
    named: list[str], model: Any, method: Any, maps: list[str]
) -> tuple[list[str], set[str]]:
    """Targets that a user named -> those that name modules for PEFT, and whole names of
    parameters.
    """
    modules: list[str] = []
    chosen: set[str] = set()
    every = dict(model.named_modules())
    holders = {m.rpartition(".")[0] for m in maps}
    for target in named:
        found = _named_by(target, list(every))
        routers = {n for n in found if _holds_routing_weight(every[n])}
        others = set(found) - routers - holders
        stacked = {m for m in maps if _named_by(target, [m, m.rpartition(".")[0]])}
        if not stacked and target in experts.EXPERT_NAMES and method.lora_experts:
            stacked = {m for m in maps if _named_by(experts.EXPERT_NAMES[target], [m])}
            partner = experts.PARTNERS.get(target)
            if stacked and partner not in (None, *named):
                raise UserError(
                    f"lora_target: {target} of the routed experts is one parameter with {partner}"
                    f" ({experts.EXPERT_NAMES[target]}) and takes one adapter. Name both, or set"
                    " lora_experts: false."
                )
        if stacked and not method.lora_experts:
            if not others:
                raise UserError(
                    f"lora_target: {target} names routed experts, and lora_experts: false keeps"
                    " adapters off them. Leave one of the two out."
                )
            stacked = set()
        chosen |= stacked | {f"{name}.weight" for name in routers}
        if others or not (stacked or routers):
            modules.append(target)
    return modules, chosen


def _holds_routing_weight(module: nn.Module) -> bool:
    """Whether a module is a router that multiplies by a matrix of its own, which PEFT can adapt as
    a parameter alone.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or len(experts.whole_shape(weight)) != 2:
        return False
    return is_router(module) or _gives_more(module)


def _refused_by_peft(target: str, model: Any) -> bool:
    """Whether PEFT puts no adapter on layers of this name in this family: on the last map of state
    space layers, which fused kernels read without its module. The log names it among what has none.
    """
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return False
    try:
        check(LoraConfig(), model, target.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _taken_for_experts(targets: list[str], model: Any) -> set[str]:
    """Names of linear layers that PEFT, where it meets them in `target_modules`, takes for those of
    routed experts in an old checkpoint of this family, and puts on the stacked parameters instead.

    In these families shared experts and dense layers have the same names.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # an earlier PEFT, which changes nothing
        return set()
    from peft import LoraConfig

    taken = set()
    mapping = get_model_conversion_mapping(model)
    for target in targets:
        config = LoraConfig(target_modules=[target])
        try:
            convert_peft_config_for_transformers(config, model, mapping)
        except ValueError:  # it is half of a stacked parameter
            taken.add(target)
        else:
            if target not in (config.target_modules or ()):
                taken.add(target)
    return taken


def _clear_ends(chosen: set[str], every: list[str]) -> list[str]:
    """Names of parameters -> ends of names by which PEFT finds these and no others: the part behind
    the layer's number where that is enough.
    """
    ends: set[str] = set()
    for name in chosen:
        end = re.sub(r".*\.\d+\.(?=\D)", "", name)
        ends.add(end if chosen.issuperset(_named_by(end, every)) else name)
    return sorted(ends)


def check_targets(model: Any, method: Any) -> Targets:
    """What a new adapter is put on. Computes with no weight.

    Raises:
        UserError: `lora_target` names what is not there, or another key is not for it.
    """
    parts = unadapted(model, method)
    oft = method.finetuning_type == "oft"
    targets = (oft_targets if oft else lora_targets)(model, method, parts)
    if not targets.modules and not targets.parameters:
        raise UserError(
            f"{method.finetuning_type}_target: all finds no layer: freeze_vision_tower and"
            " freeze_language_model freeze every part that may have an adapter. Set one of them to"
            " false."
        )
    if oft:
        return targets
    _refuse_what_parameters_cannot(targets, method, model)
    return targets


def _refuse_what_parameters_cannot(targets: Targets, method: Any, model: Any) -> None:
    """Refuses kinds of LoRA that PEFT does not have for parameters.

    Raises:
        UserError: which key, and which parameters.
    """
    keys = [name for name in ("use_dora", "lora_dropout", "pissa_init") if getattr(method, name)]
    if not targets.parameters or not keys:
        return
    shown = ", ".join(targets.parameters[:4])
    if any(_named_by(end, experts.expert_maps(model, idle(model))) for end in targets.parameters):
        advice = "set lora_experts: false, which trains the other layers alone"
    else:
        advice = "name other layers in lora_target"
    raise UserError(
        f"{' and '.join(keys)}: PEFT has none for adapters on parameters ({shown}), as those of"
        f" routed experts are. Leave {'it' if len(keys) == 1 else 'them'} out, or {advice}."
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


def _parameters_of_adapter(path: str | Path) -> Iterable[str]:
    """`target_parameters` of a saved adapter."""
    from peft import PeftConfig

    return getattr(PeftConfig.from_pretrained(str(path)), "target_parameters", None) or ()


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
        ends = _parameters_of_adapter(folder if folder.exists() else path)
        with same_draws(), warnings.catch_warnings(), experts.whole_shapes(model, ends):
            # Else PEFT makes up what an adapter lacks.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model = PeftModel.from_pretrained(
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
    experts.install(model)
    return model


def _lora_config(method: Any, targets: Targets, options: dict[str, Any]) -> Any:
    from peft import LoraConfig, TaskType

    start: bool | str = method.init_lora_weights or True
    if method.pissa_init:
        start = f"pissa_niter_{method.pissa_iter}" if method.pissa_iter > 0 else "pissa"
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=method.lora_rank,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        lora_alpha=method.lora_alpha or method.lora_rank * 2,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        init_lora_weights=start,
        **options,
    )


def _oft_config(method: Any, targets: Targets, options: dict[str, Any]) -> Any:
    from peft import OFTConfig, TaskType

    return OFTConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=method.oft_rank,
        oft_block_size=method.oft_block_size,
        module_dropout=method.module_dropout,
        target_modules=targets.modules,
        **options,
    )


def _adapter(
    model: Any, method: Any, adapters: list[str], is_trainable: bool, resized: bool
) -> Any:
    from peft import get_peft_model

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
        return model.requires_grad_(False)
    parts = unadapted(model, method)
    targets = check_targets(model, method)
    saved = _names(method.additional_target) or None
    if method.train_routers:
        routers = _clear_ends(set(router_names(model)), [n for n, _ in model.named_modules()])
        saved = [*(saved or []), *routers]
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
    _refuse_unknown(targets.modules, model, parts)
    _refuse_unknown(saved or [], model, idle(model))
    saved = _whole_where_unclear(saved, model, idle(model)) if saved else None
    options = {
        "exclude_modules": _excluded(targets.modules, model, parts),
        "modules_to_save": saved,
    }
    oft = method.finetuning_type == "oft"
    config = (_oft_config if oft else _lora_config)(method, targets, options)
    try:
        with (
            same_draws() if moves_base_weights(method) else contextlib.nullcontext(),
            experts.whole_shapes(model, targets.parameters),
        ):
            model = get_peft_model(model, config)
    except ValueError as error:  # of a module that is no layer of one matrix
        raise UserError(
            f"{method.finetuning_type}_target: {', '.join(targets.modules)} cannot all take an"
            f" adapter: {' '.join(str(error).split())[:300]} Linear layers: {linear}."
        ) from error
    experts.install(model)
    return model
