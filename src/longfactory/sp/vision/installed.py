"""Images on a model: hooks that compute this rank's parts of them, and write features over the
placeholders' embeddings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .. import hf, text_model, tower
from ..hooks import ModelHooks
from ..media import Route
from ..plan import RowPlan
from .families import (
    Family,
    Images,
    base_of,
    family_of,
    grid_features,
    is_trained,
    modules_of,
    refusal,
)

BATCH = 16384
"""Patches that a frozen tower computes at a time, at least one part."""


TRAINED_BATCH = 4096
"""The same of one that is trained: between the two passes over a batch everything in it is
stored.
"""


@dataclasses.dataclass(frozen=True)
class Installed:
    """A model whose images are computed."""

    family: Family
    hooks: ModelHooks


_installed: weakref.WeakKeyDictionary[nn.Module, Installed] = weakref.WeakKeyDictionary()


_deeper: weakref.WeakKeyDictionary[RowPlan, tuple[Tensor, tuple[Tensor, ...]]] = (
    weakref.WeakKeyDictionary()
)
"""Of a row: local places, and the features that are added there behind the first layers."""


def install(model: nn.Module) -> None:
    """Lets images into a model: from now on they pass through its tower and its projector.

    Once, after `hf.prepare` and before the model is wrapped.

    Raises:
        ValueError: its images cannot be computed. Names the model type and those that can.
    """
    inner = hf.unwrap(model)
    family = let_in(inner)
    if inner in _installed:
        return
    hooks = ModelHooks()
    decoder = text_model.decoder(inner)
    hooks.before(decoder, functools.partial(_merge, weakref.ref(inner)))
    for index, layer in enumerate(_deepstack_layers(inner)):
        hooks.after(layer, functools.partial(_add_deeper, index), with_kwargs=True)
    _installed[inner] = Installed(family, hooks)
    if family.features is grid_features:
        tower.install(base_of(inner).visual.config)


def let_in(model: PreTrainedModel) -> Family:
    """Counts tower and projector among what rows pass through (`text_model.idle`).

    Raises:
        ValueError: as `install`.
    """
    family = family_of(model.config)
    if family is None:
        raise ValueError(refusal(model.config))
    text_model.also_enter(model, (m for part in modules_of(model).values() for m in part))
    return family


def release(model: nn.Module) -> None:
    """Takes off what `install` has put on."""
    inner = hf.unwrap(model)
    if (installed := _installed.pop(inner, None)) is not None:
        installed.hooks.remove()
        if installed.family.features is grid_features:
            tower.release(base_of(inner).visual.config)


def own_tower(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Inside the block the tower's attention is transformers' own."""
    installed = _installed.get(model)
    if installed is None or installed.family.features is not grid_features:
        return contextlib.nullcontext()
    return tower.released(base_of(model).visual.config)


def has_images(model: nn.Module) -> bool:
    """Whether images pass through this model (`install`)."""
    return model in _installed


def _deepstack_layers(model: PreTrainedModel) -> list[nn.Module]:
    indexes = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", ())
    return list(text_model.decoder_layers(model)[1])[: len(indexes or ())]


class Media:
    """What one rank computes of a row's images. An argument of the model, `sp_media`.

    No dataclass: FSDP2 looks for tensors in these among a model's arguments, and would cast the
    pixels on the host, out of pinned memory.

    Args:
        route: where the features go, on the device.
        batches: this rank's parts, in the row's order, in batches.
        empty: further batches of one image each, whose features go nowhere: of a rank that has no
            parts where the tower or the projector is trained, since every rank must run them.
    """

    def __init__(
        self,
        route: Route,
        batches: tuple[tuple[Images, ...], ...],
        empty: tuple[Images, ...] = (),
    ) -> None:
        self.route, self.batches, self.empty = route, batches, empty


def batches_of(
    images: Iterable[Images], limit: int = BATCH, *, whole: bool = False
) -> tuple[tuple[Images, ...], ...]:
    """Images in batches of at most `limit` patches, videos cut between their parts; with `whole`
    each image is a batch.
    """
    if whole:
        return tuple((image,) for image in images)
    out: list[list[Images]] = []
    held = limit
    for image in images:
        each = max(1, image.grid[1] * image.grid[2])
        first = 0
        while first < image.grid[0]:
            if held + each > limit:
                out.append([])
                held = 0
            last = min(image.grid[0], first + max(1, (limit - held) // each))
            out[-1].append(image.parts(first, last))
            held += (last - first) * each
            first = last
    return tuple(tuple(batch) for batch in out)


def _merge(
    reference: weakref.ref[PreTrainedModel],
    decoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the text decoder: features in place of the placeholders' embeddings."""
    if "sp_media" not in kwargs:
        return None
    kwargs = dict(kwargs)
    media: Media | None = kwargs.pop("sp_media")
    model = reference()
    if media is None or model is None:
        return args, kwargs
    embeddings: Tensor = kwargs["inputs_embeds"]
    features = _features(model, media, embeddings)
    if features is None:
        return args, kwargs
    with torch.profiler.record_function("images: exchange"):
        arrived = media.route.exchange(features).to(embeddings.dtype)
    hidden = embeddings.shape[-1]
    level, *deeper = arrived.split(hidden, dim=-1)
    places = media.route.places
    kwargs["inputs_embeds"] = embeddings.index_copy(1, places, level[None])
    if deeper:
        _deeper[kwargs["sp_plan"]] = (places, tuple(deeper))
    return args, kwargs


def _features(model: PreTrainedModel, media: Media, embeddings: Tensor) -> Tensor | None:
    """[rows + extra, levels * hidden] of this rank's parts; None where no rank of the group has any
    and none is trained.
    """
    batches = [*media.batches, *((image,) for image in media.empty)]
    if not batches:
        if not media.route.anyone:
            return None
        width = embeddings.shape[-1] * (1 + len(_deepstack_layers(model)))
        return embeddings.new_zeros(0, width)
    trained = torch.is_grad_enabled() and is_trained(model)
    run = functools.partial(features_of, model)
    out = []
    for batch in batches:
        if trained:
            features = checkpoint(
                run, batch, embeddings.device, use_reentrant=False, preserve_rng_state=False
            )
        else:
            with torch.no_grad():
                features = run(batch, embeddings.device)
        out.append(features)
    found = sum(len(x) for x in out[: len(media.batches)])
    if found != media.route.rows:
        raise ValueError(
            f"The tower gave {found} features for {media.route.rows} placeholders: the processor"
            " belongs to another model."
        )
    return torch.cat(out)


def features_of(model: PreTrainedModel, images: Sequence[Images], device: torch.device) -> Tensor:
    """[tokens, levels * hidden] that the tower and the projector make of images, in their order."""
    with torch.profiler.record_function("images: tower"):
        return _installed[model].family.features(base_of(model), images, device)


def _add_deeper(
    index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Any:
    """Behind one of the first layers: the features of its level."""
    held = _deeper.get(kwargs["sp_plan"]) if kwargs.get("sp_plan") is not None else None
    if held is None:
        return None
    places, levels = held
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden.index_add(1, places, levels[index].to(hidden.dtype)[None])
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def deeper_of(plan: RowPlan) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Local places of a row, and the features that are added there behind the first layers; empty
    where there are none.
    """
    return _deeper.get(plan, (torch.zeros(0, dtype=torch.int64), ()))
