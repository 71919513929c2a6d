"""Which parameters are trained: all of them, some layers (freeze), or adapters (LoRA and its kin,
by peft).
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longfactory.config.adapter_facts import ADAPTERS, moves_base_weights
from longfactory.errors import UserError
from longfactory.model import damaged, experts
from longfactory.model.adapter_targets import (
    Targets,
    check_targets,
    clear_ends,
    excluded,
    expanded_layers,
    frozen_parts,
    linear_names,
    listed,
    refuse_unknown,
    unadapted,
    whole_where_unclear,
)
from longfactory.sp import hf, text_model, vision
from longfactory.sp.routers import is_router
from longfactory.sp.text_model import Idle, decoder_layers, idle

log = logging.getLogger("longfactory")


def apply_finetuning(
    model: Any, method: Any, model_args: Any, *, is_trainable: bool = True, new_tokens: bool = False
) -> Any:
    """Makes the model trainable as `finetuning_type` says and returns it (wrapped by peft for
    LoRA and OFT).

    What a row of text does not pass through (towers, projectors) is frozen whatever
    `finetuning_type` says: it has no gradient.

    Args:
        method: the finetuning arguments (`finetuning_type`, `lora_*`, `freeze_*`, ...).
        model_args: the model arguments (`adapter_name_or_path`).
        is_trainable: False: adapters that are named are merged, and none is made.
        new_tokens: there are tokens that the model never saw, so that embeddings must be trained
            and saved beside an adapter.
    """
    kind = method.finetuning_type
    adapters = listed(model_args.adapter_name_or_path)
    if adapters and kind not in ADAPTERS:
        raise UserError(f"adapter_name_or_path needs finetuning_type: lora or oft, not {kind}.")
    if kind == "full":
        model.requires_grad_(is_trainable)
    elif kind == "freeze":
        _freeze(model, method)
    elif kind in ADAPTERS:
        model = _adapter(model, method, adapters, is_trainable, new_tokens)
        _leave_adapted_untied(model)
    else:
        raise UserError(f"finetuning_type: {kind} is not supported. Use full, freeze, lora or oft.")
    if method.train_routers is not None and is_trainable:
        _train_routers(model, method.train_routers)
    freeze_idle(model)
    _freeze_parts(model, method)
    return model


def _leave_adapted_untied(model: nn.Module) -> None:
    """Where PEFT trains a copy or some tokens of an embedding that is tied to the output layer, or
    of that layer, or has an adapter on one of them, no tie is made again: accelerate ties weights
    once more while it shards a model for FSDP2, and would tie the other one to the copy, or end
    with an error. What is frozen stays equal untied.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner: Any = hf.unwrap(model)
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    modules = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    wrapped = (AuxiliaryTrainingWrapper, BaseTunerLayer)
    if any(isinstance(inner.get_submodule(name), wrapped) for name in modules):
        inner.tie_weights = _tie_nothing


def refuse_sharded_ties(model: nn.Module) -> None:
    """Refuses for FSDP2 an adapter that has parameters in two places: it shards each by itself.

    Raises:
        UserError: the key of the adapter, and what to use.
    """
    if not getattr(hf.unwrap(model), "all_tied_weights_keys", None):
        return
    for config in getattr(model, "peft_config", {}).values():
        for key in ("ensure_weight_tying", "trainable_token_indices"):
            if getattr(config, key, None):
                raise UserError(
                    f"The adapter's {key} trains the same numbers in the embedding and in the"
                    " output layer, which are tied: FSDP2 cannot shard them. Use sharding: ddp."
                )


def _tie_nothing(*_: Any, **__: Any) -> None:
    pass


def _parts_of(inner: Any) -> dict[str, set[int]]:
    """`id`s of the parameters of a model's tower, projector and language part."""
    modules = vision.modules_of(inner)
    held = {
        part: {id(p) for m in modules[part] for p in m.parameters()}
        for part in ("tower", "projector")
    }
    held["projector"] |= {id(p) for p in vision.own_parameters(inner)}
    language = [text_model.decoder(inner), inner.get_output_embeddings()]
    return {
        "projector": held["projector"],
        "tower": held["tower"] - held["projector"],
        "language": {id(p) for m in language if m is not None for p in m.parameters()},
    }


def _frozen_names(inner: Any, method: Any) -> set[str]:
    """Names of the parameters of an unwrapped model that the keys of its parts freeze; none of a
    model that text alone passes through.
    """
    if not text_model.enters_more_than_text(inner):
        return set()
    of = _parts_of(inner)
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


def router_modules(inner: nn.Module) -> set[int]:
    """`id`s of the routers and of what is in them."""
    routers = router_names(inner)
    return {
        id(module)
        for name, module in inner.named_modules()
        if any(name == router or name.startswith(f"{router}.") for router in routers)
    }


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


def cast_trainable(model: nn.Module, values: bool = True) -> None:
    """fp32 master weights: an update of 1e-5 is lost in a bf16 weight. `values`: the weights have
    some; else nothing is written into the wider memory, which the host then does not provide.
    """
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point() and p.dtype != torch.float32:
            p.data = p.data.float() if values else torch.empty_like(p.data, dtype=torch.float32)


def _freeze(model: nn.Module, method: Any) -> None:
    prefix, layers = decoder_layers(model)
    parts = idle(hf.unwrap(model))
    n, count = len(layers), method.freeze_trainable_layers
    if count == 0 and not (listed(method.freeze_extra_modules) and not method.use_llama_pro):
        raise UserError(
            "freeze_trainable_layers: 0 trains nothing. Give the number of layers, or"
            " freeze_extra_modules."
        )
    if method.use_llama_pro:
        chosen = expanded_layers(n, count)
    else:
        chosen = range(max(0, n - count), n) if count >= 0 else range(min(n, -count))
    names = listed(method.freeze_trainable_modules)
    layer_names = {
        part for layer in layers for name, _ in layer.named_parameters() for part in name.split(".")
    }
    unknown = [m for m in names if m != "all" and m not in layer_names]
    if unknown:
        raise UserError(
            f"freeze_trainable_modules: {', '.join(unknown)} not found in a decoder layer. It has:"
            f" {', '.join(sorted(layer_names))}."
        )
    extra = listed(method.freeze_extra_modules)
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
        beside = not name.startswith(prefix + ".") and any(m in name.split(".") for m in extra)
        p.requires_grad_(in_layer or beside)
    _train_parts(model, method)


def _train_parts(model: nn.Module, method: Any) -> None:
    """What `freeze_multi_modal_projector: false` and `freeze_vision_tower: false` train beside the
    text model's layers.

    Raises:
        UserError: of the tower nothing was named, and the layers that are counted are the text
            model's.
    """
    inner = hf.unwrap(model)
    if not text_model.enters_more_than_text(inner):
        return
    of, frozen = _parts_of(inner), frozen_parts(method)
    if "projector" not in frozen:
        for p in inner.parameters():
            if id(p) in of["projector"]:
                p.requires_grad_(True)
    if "tower" in frozen or any(
        p.requires_grad for p in inner.parameters() if id(p) in of["tower"]
    ):
        return
    names = ", ".join(n for n, m in inner.named_modules() if m in vision.modules_of(inner)["tower"])
    raise UserError(
        "freeze_vision_tower: false, and finetuning_type: freeze trains layers of the text model:"
        f" nothing of the tower ({names}) would be trained. Name its modules in"
        " freeze_extra_modules, set freeze_vision_tower: true, or use finetuning_type: full or"
        " lora."
    )


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


def start_from_weights(paths: str | Sequence[str] | None) -> bool:
    """Whether an adapter of these folders or names is loaded by way of the base weights: one that
    began as a part of them (PiSSA and its kin) is taken out of them again. What cannot be read is
    left to `load_adapter`, which says why.
    """
    from peft import PeftConfig

    starts = []
    for path in listed(paths):
        folder = Path(path).expanduser()
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            config = PeftConfig.from_pretrained(str(folder) if folder.exists() else path)
            starts.append(getattr(config, "init_lora_weights", None))
    return any(isinstance(s, str) and s not in ("gaussian", "orthogonal") for s in starts)


GROWN = (
    " If its run made the vocabulary larger, set resize_vocab: true here too, with the add_tokens"
    " or add_special_tokens of that run."
)


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
        wrong = damaged.found(folder, damaged.ADAPTER) if folder.exists() else None
        if wrong is not None:
            raise UserError(f"{key}: {wrong}") from e
        if folder.exists():
            grown = ".original_module.weight" in words and "size mismatch" in words
            raise UserError(
                f"{key}: {path} does not fit {model.config.name_or_path}: {words}"
                + (GROWN if grown else "")
            ) from e
        raise UserError(
            f"{key}: there is no folder {path}, and the hub gave no adapter of that name: {words}"
        ) from e
    experts.install(model)
    return model


def merge_adapter(
    model: Any, path: str, *, key: str = "adapter_name_or_path", safe_merge: bool = False
) -> Any:
    """The model with the adapter of a folder or a name merged.

    Where an embedding is tied to the output layer and LoRA is on one of them, PEFT adds its product
    to both, and where it is on both, twice. Here the two get weights of their own first. An adapter
    that was made with `ensure_weight_tying` has them tied again.

    Args:
        key: where the user named it.
        safe_merge: PEFT looks for NaN before it changes a weight.
    Raises:
        UserError: there is no adapter, or it was trained on another model.
        ValueError: it cannot be merged.
    """
    adapted = load_adapter(model, path, key=key)
    inner: Any = hf.unwrap(adapted)
    stay_tied = any(getattr(c, "ensure_weight_tying", False) for c in adapted.peft_config.values())
    pairs = _tied_with_lora(inner)
    for name, _ in pairs:
        layer = _base(inner.get_submodule(name))
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        merged = adapted.merge_and_unload(safe_merge=safe_merge)
    for name, source in pairs:
        if stay_tied:
            merged.get_submodule(name).weight = merged.get_submodule(source).weight
        else:
            merged.all_tied_weights_keys.pop(f"{name}.weight")
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = stay_tied
    return merged


def _tied_with_lora(inner: Any) -> list[tuple[str, str]]:
    """The names of the modules of each tied pair of which LoRA is on one or both, the one that
    transformers ties to the other first.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    pairs = []
    for target, source in (getattr(inner, "all_tied_weights_keys", None) or {}).items():
        names = target.rpartition(".")[0], source.rpartition(".")[0]
        one, other = (inner.get_submodule(name) for name in names)
        lora = isinstance(one, BaseTunerLayer) or isinstance(other, BaseTunerLayer)
        if lora and _base(one).weight is _base(other).weight:
            pairs.append(names)
    return pairs


def _base(module: Any) -> Any:
    """The layer itself, without its adapter."""
    return getattr(module, "base_layer", module)


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
    model: Any, method: Any, adapters: list[str], is_trainable: bool, new_tokens: bool
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
            model = merge_adapter(model, path)
        resume = last
    if resume is not None:
        return load_adapter(model, resume, is_trainable=is_trainable)
    if not is_trainable:
        return model.requires_grad_(False)
    parts = unadapted(model, method)
    targets = check_targets(model, method)
    saved = listed(method.additional_target) or None
    if method.train_routers:
        routers = clear_ends(set(router_names(model)), [n for n, _ in model.named_modules()])
        saved = [*(saved or []), *routers]
    if saved is None and new_tokens:
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
    refuse_unknown("additional_target", saved or [], model, idle(model))
    saved = whole_where_unclear(saved, model, idle(model)) if saved else None
    options = {
        "exclude_modules": excluded(targets.modules, model, parts),
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
