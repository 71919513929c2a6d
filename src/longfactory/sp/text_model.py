"""The class that a checkpoint is, and the part of a model that a row of text passes through.

Many decoder models are published together with a vision or an audio tower (Gemma 3, Qwen-VL,
Mistral 3, Llava). They are loaded as the class that their configuration names, so that what is
saved has the same tensors under the same names; a row of text passes through their text decoder,
their embedding and their output layer alone. Everything else is *idle*: it has no gradient.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import weakref
from collections.abc import Iterable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from longfactory.errors import UserError
from longfactory.sp import hf
from longfactory.sp.indexer import indexers

# In order: a checkpoint with a tower is the class that has the tower, where its configuration names
# none.
_MAPPINGS = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)
_AUTO = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")

# Names of modules that compute on images or sound. Read in models of several parts only, for those
# that hold them inside the decoder.
_NOT_TEXT = re.compile(r"(^|[._])(vision|visual|image|video|audio|speech|protein)([._]|$)")

# Their forward has no way past the tower, which its signature does not tell.
_NEEDS_MORE_THAN_TEXT = {
    "idefics": "images",
    "kosmos-2": "images",
    "voxtral_realtime": "sound",
    "diffusion_gemma": "a part of the text that it denoises",
}

_OTHER_TASKS = {
    "shieldgemma2": (
        "it says of images whether they break a rule, and its checkpoints load as that classifier"
        " alone"
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelClass:
    """`kind` is a model class of transformers, or an Auto class for a model whose code comes with
    the checkpoint.
    """

    kind: Any
    config: PreTrainedConfig
    remote: bool = False

    @property
    def name(self) -> str:
        return self.kind.__name__

    def from_config(self, **kwargs: Any) -> PreTrainedModel:
        """A model with random weights. `kwargs`: dtype, attn_implementation,
        experts_implementation.
        """
        if self.remote:
            return self.kind.from_config(self.config, trust_remote_code=True, **kwargs)
        return self.kind._from_config(self.config, **kwargs)

    def from_pretrained(self, path: str, **kwargs: Any) -> PreTrainedModel:
        return self.kind.from_pretrained(path, config=self.config, **kwargs)


def model_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> ModelClass:
    """The class that a configuration names, where it generates text; else the one that transformers
    has for its `model_type`.

    Raises:
        ValueError: there is none, it needs more than text, or its code comes with the checkpoint
            and may not be run. Names the model type, the classes and what to do.
    """
    kind, named = (
        config.model_type,
        [str(name) for name in getattr(config, "architectures", None) or ()],
    )
    remote = getattr(config, "auto_map", None) or {}
    auto = next((name for name in _AUTO if name in remote), None)
    if auto is not None and trust_remote_code:
        return ModelClass(getattr(transformers, auto), config, remote=True)
    if reason := _needs(config):
        raise ValueError(f"Models of type {kind} cannot be trained here: {reason}.")
    mappings = [getattr(modeling_auto, name) for name in _MAPPINGS]
    known = {c for mapping in mappings for value in mapping.values() for c in _all(value)}
    found = next((n for n in named if n in known and hasattr(transformers, n)), None)
    if found is None:
        by_type = [
            c
            for mapping in mappings
            if kind in mapping
            for c in _all(mapping[kind])
            if hasattr(transformers, c)
        ]
        found = by_type[0] if by_type else None
    if found is None:
        what = f"{' or '.join(named)} (model_type {kind})" if named else f"model_type {kind}"
        if auto is not None or remote:
            raise ValueError(
                f"{what} brings its own code. If you trust it, set trust_remote_code: true."
            )
        raise ValueError(
            f"{what}: transformers {transformers.__version__} has no class of it that continues a"
            " text. Choose a model type that docs/models.md marks exact."
        )
    decoders = {
        c for value in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for c in _all(value)
    }
    if getattr(config, "is_encoder_decoder", False) and found not in decoders:
        raise ValueError(
            f"Models of type {kind} cannot be trained here: {found} has an encoder and a decoder,"
            " and continues no text."
        )
    cls = getattr(transformers, found)
    if lacking := _required(cls):
        raise ValueError(
            f"Models of type {kind} cannot be trained here: the forward of {found} needs"
            f" {', '.join(lacking)} beside text."
        )
    text = config.sub_configs.get("text_config") if isinstance(config.sub_configs, dict) else None
    if text is not None and getattr(cls, "config_class", None) is text and type(config) is not text:
        quantization, config = (
            getattr(config, "quantization_config", None),
            config.get_text_config(),
        )
        if quantization is not None:
            config.quantization_config = quantization
    return ModelClass(cls, config)


def _all(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _needs(config: PreTrainedConfig) -> str | None:
    """Why no text alone can be given to it, as far as the configuration tells, or None."""
    if config.model_type in _NEEDS_MORE_THAN_TEXT:
        return f"its forward needs {_NEEDS_MORE_THAN_TEXT[config.model_type]} beside text"
    if config.model_type in _OTHER_TASKS:
        return _OTHER_TASKS[config.model_type]
    try:
        config.get_text_config()
    except ValueError as error:  # several text models in one
        return f"it has several text models ({' '.join(str(error).split())[:120]})"
    return None


def _required(cls: Any) -> list[str]:
    """Arguments that the class's forward cannot be called without, beside the tokens."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name != "input_ids"
    ]


@dataclasses.dataclass(frozen=True)
class Idle:
    """What gets no gradient of a row of text: the outermost modules, and the names of all
    parameters.
    """

    modules: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        """Whether a module or a parameter is idle or lies in an idle module."""
        return name in self.parameters or any(
            name == m or name.startswith(m + ".") for m in self.modules
        )


_also_entered: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def also_enter(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """From now on rows of this model pass through these modules too: its tower, say (`vision`)."""
    _also_entered.setdefault(model, weakref.WeakSet()).update(modules)


def enters_more_than_text(model: nn.Module) -> bool:
    """Whether `also_enter` has named modules of this model."""
    return model in _also_entered


def idle(model: PreTrainedModel) -> Idle:
    """The towers, projectors and other parts of a model that its rows do not pass through: of rows
    of text, but for what `also_enter` names. And the indexers, to which no gradient comes.

    Args:
        model: not wrapped (see `hf.unwrap`), with or without adapters.
    """
    beside, chooses = _beside_text(model), {id(m) for m in indexers(model)}
    if not chooses:
        return beside
    names = tuple(name for name, m in model.named_modules() if id(m) in chooses)
    below = tuple(f"{name}." for name in names)
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    inside = {name for name in every if name.startswith(below)}
    return Idle((*beside.modules, *names), beside.parameters | inside)


def _beside_text(model: PreTrainedModel) -> Idle:
    """Of `idle`: what rows do not pass through. Nothing in a model of text alone."""
    config = model.config
    if not getattr(config, "sub_configs", None):
        return Idle()
    entered, skipped = _entered(model), _skipped_layers(model)
    modules: list[str] = []
    passed: set[int] = set()
    others = _also_entered.get(model, ())
    entered |= {id(m) for m in others}

    def walk(module: nn.Module, path: str, inside: bool) -> None:
        if inside or (others and module is getattr(model, "model", None)):
            passed.update(id(p) for p in module._parameters.values() if p is not None)
        for name, child in module.named_children():
            below, enters = f"{path}{name}", inside or id(child) in entered
            if child in others:
                passed.update(id(p) for p in child.parameters())
                continue
            leads = enters or any(id(m) in entered for m in child.modules())
            if not leads or id(child) in skipped or _NOT_TEXT.search(below):
                modules.append(below)
            else:
                walk(child, below + ".", enters)

    walk(model, "", id(model) in entered)
    # A parameter may have two names: tied weights are passed under either.
    names = {
        name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in passed
    }
    return Idle(tuple(modules), frozenset(names))


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that holds the text decoder's layers; the model itself where transformers finds
    nothing narrower.
    """
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return (
        found
        if isinstance(found, nn.Module)
        and any(isinstance(m, nn.ModuleList) for m in found.modules())
        else model
    )


def embedding(model: PreTrainedModel) -> nn.Module | None:
    """The embedding of the text's tokens, or None where transformers finds none."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _entered(model: PreTrainedModel) -> set[int]:
    """Modules (their `id`) that a row of text enters: the decoder, the embedding, the output layer,
    a value head.
    """
    parts = [
        decoder(model),
        embedding(model),
        model.get_output_embeddings(),
        getattr(model, "v_head", None),
    ]
    return {id(m) for m in parts if m is not None}


def _skipped_layers(model: PreTrainedModel) -> set[int]:
    """Decoder layers (their `id`) that only attend to an image: mllama leaves them out where there
    is none.
    """
    indices = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    if not indices or model.config.model_type != "mllama":
        return set()
    layers = next(m for m in decoder(model).modules() if isinstance(m, nn.ModuleList))
    return {id(layer) for i, layer in enumerate(layers) if i in indices}


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder layers: the longest ModuleList of the text decoder."""
    inner = _transformers_model(model)
    inside = {id(m) for m in (decoder(inner) if inner is not None else model).modules()}
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and id(module) in inside
            and not re.search(r"vision|visual|audio|experts|lora", name)
            and (best is None or len(module) > len(best[1]))
        ):
            best = (name, module)
    if best is None:
        raise UserError(f"{type(model).__name__} has no list of decoder layers.")
    return best


def _transformers_model(model: nn.Module) -> Any:
    """The transformers model inside what wraps it, or None where there is none."""
    try:
        return hf.unwrap(model)
    except ValueError:
        return None
