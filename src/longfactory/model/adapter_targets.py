"""What an adapter is put on: the keys `lora_target` and `oft_target`, as names by which PEFT finds
modules and parameters.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from longfactory.errors import UserError
from longfactory.model import experts
from longfactory.sp import hf, text_model, vision
from longfactory.sp.routers import is_router
from longfactory.sp.text_model import Idle, idle


def listed(value: Any) -> list[str]:
    """The names of a key that takes a list or words with commas between."""
    if not value:
        return []
    return (
        [v.strip() for v in value.split(",") if v.strip()]
        if isinstance(value, str)
        else list(value)
    )


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
    if listed(named) == ["all"]:
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


def refuse_unknown(key: str, targets: list[str], model: Any, parts: Idle) -> None:
    """Refuses targets of LoRA or OFT, and modules to save, that are nowhere, or only where text
    does not pass.

    Args:
        key: where the user named them.
        parts: what text does not pass through.
    Raises:
        UserError: with the names that there are.
    """
    names = [name for name, _ in model.named_modules()]
    found = {t: _named_by(t, names) for t in targets}
    if unknown := [t for t, at in found.items() if not at]:
        raise UserError(
            f"{key}: {', '.join(unknown)} not found in the model. {_there(key, model, parts)}"
        )
    frozen = ""
    if text_model.enters_more_than_text(model):
        frozen = " or which freeze_vision_tower and similar keys freeze"
    if unpassed := [t for t, at in found.items() if all(n in parts for n in at)]:
        raise UserError(
            f"{key}: {', '.join(unpassed)} cannot be trained on text: it lies in"
            f" {', '.join(parts.modules)}, which text does not pass through{frozen}."
            f" {_there(key, model, parts)}"
        )


def _there(key: str, model: Any, parts: Idle) -> str:
    """What a key may name in this model."""
    if key == "additional_target":
        own = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if name not in parts and next(module.parameters(recurse=False), None) is not None
        }
        return f"Modules with weights: {', '.join(sorted(n for n in own if not n.isdigit()))}."
    words = f"Linear layers: {', '.join(linear_names(model))}."
    if key == "lora_target" and (maps := experts.expert_maps(model, parts)):
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        words += f" Routed experts: {', '.join(clear_ends(set(maps), parameters))}."
    return words


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
    named = listed(method.lora_target)
    maps = experts.expert_maps(model, parts)
    if named == ["all"]:
        every = linear_names(model, parts)
        modules = [
            name
            for name in every
            if not (_refused_by_peft(name, model) or _read_by_weight(name, model))
        ]
        chosen = set(maps if method.lora_experts else ())
    else:
        modules, chosen = _resolved(named, model, method, maps)
        refuse_unknown(f"{method.finetuning_type}_target", modules, model, parts)
    taken = _taken_for_experts(modules, model)
    layers = [name for name, _ in model.named_modules() if name not in parts]
    for target in taken:
        chosen |= {f"{name}.weight" for name in _named_by(target, layers)}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return Targets(
        [target for target in modules if target not in taken], clear_ends(chosen, parameters)
    )


def oft_targets(model: Any, method: Any, parts: Idle) -> Targets:
    """What `oft_target` means: linear layers alone, since PEFT rotates the inputs of modules and
    not of stacked parameters.

    Raises:
        UserError: a name is nowhere, or names routed experts or routers.
    """
    named = listed(method.oft_target)
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


_READ_BY_WEIGHT = {
    "dt_proj": ("falcon_mamba", "jamba", "mamba"),
    "correction_coefs": ("gemma3n", "gemma3n_text"),
}
"""Linear layers whose weights transformers multiplies by itself, in the families that do. PEFT puts
adapters on them, which nothing calls: they would have no gradient.
"""


def _read_by_weight(target: str, model: Any) -> bool:
    """Whether an adapter on layers of this name would do nothing in this family."""
    return model.config.model_type in _READ_BY_WEIGHT.get(target.rpartition(".")[2], ())


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


def clear_ends(chosen: set[str], every: list[str]) -> list[str]:
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
    return in_expanded_layers(targets, model, method) if method.use_llama_pro else targets


def expanded_layers(layers: int, added: int) -> range:
    """The layers that block expansion has added: the last one of each group.

    Args:
        layers: of the expanded model.
        added: of them, `freeze_trainable_layers`.
    Raises:
        UserError: the groups would differ in length.
    """
    if added <= 0 or layers % added:
        raise UserError(
            f"use_llama_pro trains every ({layers}/{added})th layer: {layers} layers are not"
            f" divisible by freeze_trainable_layers: {added}."
        )
    stride = layers // added
    return range(stride - 1, layers, stride)


def in_expanded_layers(targets: Targets, model: Any, method: Any) -> Targets:
    """The same targets in the layers that block expansion has added, by their whole names.

    Raises:
        UserError: nothing of them lies there.
    """
    prefix, layers = text_model.decoder_layers(model)
    chosen = tuple(
        f"{prefix}.{i}." for i in expanded_layers(len(layers), method.freeze_trainable_layers)
    )
    if text_model.enters_more_than_text(model) and "tower" not in frozen_parts(method):
        raise UserError(
            "use_llama_pro puts adapters on the added layers of the text model alone, and"
            " freeze_vision_tower: false asks for some in the tower. Leave one of them out."
        )
    modules = [name for name, _ in model.named_modules() if name.startswith(chosen)]
    parameters = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name.startswith(chosen)
    ]
    found = Targets(
        sorted({name for target in targets.modules for name in _named_by(target, modules)}),
        sorted({name for end in targets.parameters for name in _named_by(end, parameters)}),
    )
    if not found.modules and not found.parameters:
        raise UserError(
            "use_llama_pro: lora_target names nothing in the added layers"
            f" ({', '.join(name[:-1] for name in chosen)})."
        )
    return found


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


def excluded(targets: list[str], model: Any, parts: Idle) -> str | None:
    """peft's `exclude_modules`, a pattern of whole names, where a target's leaf name also stands in
    a part that text does not pass.
    """
    names = [name for name, _ in model.named_modules()]
    if not any(n in parts for t in targets for n in _named_by(t, names)):
        return None
    return "(" + "|".join(re.escape(m) for m in parts.modules) + r")(\..*)?"


def whole_where_unclear(targets: list[str], model: Any, parts: Idle) -> list[str]:
    """`modules_to_save` has no exclusion: a leaf name that also stands in a part that text does not
    pass is written out.
    """
    names = [name for name, _ in model.named_modules()]
    out: list[str] = []
    for target in targets:
        at = _named_by(target, names)
        out += [n for n in at if n not in parts] if any(n in parts for n in at) else [target]
    return out
