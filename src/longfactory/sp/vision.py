"""Vision-language models of transformers on a sharded row: images and video frames are computed by
the ranks that they are dealt to, and their features go to the ranks that hold the placeholders.

    vision.install(model)  # after hf.prepare
    inputs = hf.inputs(row, plan)
    model(**inputs, sp_media=vision.Media(...))

The model is called as for text, with its token ids alone. A hook at the text decoder's input runs
the model's own `get_image_features` on this rank's parts, a batch of them at a time, sends the
features on their way (`media.Route`) and writes what arrives over this rank's embeddings of the
placeholders. Features that enter deeper layers (deepstack) are added behind these. Nothing waits
for the device: every index is made on the host.

Where the tower or the projector is trained, a batch is computed again in the backward pass, from
pixels that stay on the host: what a step holds does not grow with the length of a video.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from . import hf, text_model, tower
from .hooks import ModelHooks
from .media import Route
from .pinned import copied
from .plan import RowPlan

BATCH = 16384
"""Patches that a frozen tower computes at a time, at least one part."""
TRAINED_BATCH = 4096
"""The same of one that is trained: between the two passes over a batch everything in it is
stored.
"""


@dataclasses.dataclass(frozen=True)
class Images:
    """Parts of one image or video, as the model's processor made them, on the host.

    Attributes:
        kind: image or video.
        grid: parts, and height and width of each in patches, before patches are merged.
        pixels: [parts * height * width, numbers of a patch] where the tower takes patches, else
            [parts, channels, height, width].
        size: height and width of the image before it was cut (families that need it), or ().
        ends: whether the last part of the image or video is among them.
    """

    kind: Literal["image", "video"]
    grid: tuple[int, int, int]
    pixels: Tensor
    size: tuple[int, ...] = ()
    ends: bool = True

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def parts(self, first: int, last: int) -> Images:
        """Its parts [first, last)."""
        each = len(self.pixels) // self.grid[0]
        return dataclasses.replace(
            self,
            grid=(last - first, *self.grid[1:]),
            pixels=self.pixels[first * each : last * each],
            ends=self.ends and last == self.grid[0],
        )


Features = Callable[[Any, Sequence[Images], torch.device], Tensor]
"""(the model that has get_image_features, images, device) -> [tokens, levels * hidden]."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models whose images are computed in one way.

    Attributes:
        types: `model_type` of their configurations.
        features: what runs the tower.
        tower, projector: modules, by the end of their names.
        whole: an image is one part, whatever its number of tiles; else each tile or frame is.
    """

    types: tuple[str, ...]
    features: Features
    tower: tuple[str, ...]
    projector: tuple[str, ...]
    whole: bool = False


def _grid_features(model: Any, images: Sequence[Images], device: torch.device) -> Tensor:
    """Of towers that take patches and a grid of them."""
    from transformers import vision_utils

    visual = model.visual
    # One line for each part, on the host: reading a grid on the device would wait for it.
    grid = torch.tensor([(1, *i.grid[1:]) for i in images for _ in range(i.grid[0])])
    merge = int(visual.spatial_merge_size)
    made = {
        "position_ids": vision_utils.get_vision_position_ids(grid, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
    }
    if hasattr(visual, "num_grid_per_side"):
        places, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        made |= {"interp_indices": places, "interp_weights": weights}
    if hasattr(visual, "fullatt_block_indexes"):
        window, lengths = vision_utils.get_vision_window_index(
            grid, merge, visual.window_size, visual.patch_size
        )
        made |= {"window_index": window, "cu_window_seqlens": lengths}
    # Read by the host, layer by layer; GLM's embeddings compute with them.
    on_host = {"cu_seqlens", "cu_window_seqlens"} - set(
        made if hasattr(visual, "embeddings") else ()
    )
    kwargs = {k: v if k in on_host else copied(v, device) for k, v in made.items()}
    if hasattr(visual, "embeddings"):
        grid = copied(grid, device)
    out = model.get_image_features(_pixels(images, device), grid, return_dict=True, **kwargs)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    # A level is one tensor of all images, or one for each of them.
    whole = [x if isinstance(x, Tensor) else torch.cat(tuple(x)) for x in levels]
    return torch.cat(whole, dim=-1)


def _tile_features(model: Any, images: Sequence[Images], device: torch.device) -> Tensor:
    """Of towers that take tiles of one size."""
    out = model.get_image_features(_pixels(images, device), return_dict=True)
    return out.pooler_output.flatten(0, -2)


def _anyres_features(model: Any, images: Sequence[Images], device: torch.device) -> Tensor:
    """Of LLaVA-OneVision: an image of several tiles is put together, cut to its own shape and gets
    a token at the end of each line; a video's frames are pooled, with one token at its end.
    """
    out = []
    for image in images:
        pixels = image.pixels.to(device, non_blocking=True)
        if image.kind == "video":
            features = model.get_video_features(pixels[None], return_dict=True).pooler_output[0]
            out.append(features if image.ends else features[:-1])
            continue
        # A sample of several images has them whole; so has one of two, which this is taken for.
        several = {"batch_num_images": torch.tensor([2])} if image.grid[0] == 1 else {}
        features = model.get_image_features(
            pixels, torch.tensor([image.size]), return_dict=True, **several
        )
        out += list(features.pooler_output)
    return torch.cat(out)


def _pixels(images: Sequence[Images], device: torch.device) -> Tensor:
    return torch.cat([i.pixels.to(device, non_blocking=True) for i in images])


FAMILIES = (
    Family(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
            *("glm4v", "glm4v_moe"),
        ),
        _grid_features,
        tower=("visual",),
        projector=("visual.merger",),
    ),
    Family(
        ("gemma3", "internvl"),
        _tile_features,
        tower=("vision_tower",),
        projector=("multi_modal_projector",),
    ),
    Family(
        ("llava_onevision",),
        _anyres_features,
        tower=("vision_tower",),
        projector=("multi_modal_projector",),
        whole=True,
    ),
)

_REASONS = {
    "mllama": (
        "its text decoder reads images by cross-attention from every token to all features of an"
        " image, which the engine does not shard"
    ),
    "idefics": (
        "its text decoder reads images by cross-attention, which the engine does not shard"
    ),
}

_SIGLIP = "siglip_vision_model"
_BLOCKS = ("gemma3",)
"""Families whose text decoder lets the tokens of an image see each other."""


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a model by its configuration; None where its images cannot be computed."""
    return next((f for f in FAMILIES if config.model_type in f.types), None)


# ---- what is put on a model ----------------------------------------------------------------------


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
    if family.features is _grid_features:
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
        if installed.family.features is _grid_features:
            tower.release(base_of(inner).visual.config)


def own_tower(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Inside the block the tower's attention is transformers' own."""
    installed = _installed.get(model)
    if installed is None or installed.family.features is not _grid_features:
        return contextlib.nullcontext()
    return tower.released(base_of(model).visual.config)


def has_images(model: nn.Module) -> bool:
    """Whether images pass through this model (`install`)."""
    return model in _installed


def refusal(config: PreTrainedConfig) -> str:
    """Why images of a model cannot be trained on."""
    known = ", ".join(sorted(kind for f in FAMILIES for kind in f.types))
    if getattr(config, "vision_config", None) is None:
        return f"Models of type {config.model_type} have no vision tower. Those with one: {known}."
    reason = _REASONS.get(config.model_type, "how its tower is run on a part of a row is not known")
    return (
        f"Images of models of type {config.model_type} cannot be trained on: {reason}. Those of"
        f" {known} can be. docs/models.md says whether text alone can be."
    )


def has_blocks(config: PreTrainedConfig) -> bool:
    """Whether the tokens of an image see each other."""
    return config.model_type in _BLOCKS


def modules_of(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The modules that images pass through before the text decoder: `tower` and `projector`. Of
    some families the projector lies in the tower, and is in both.
    """
    family, base = family_of(model.config), base_of(model)
    ends = {"tower": (), "projector": ()} if family is None else vars(family)
    return {
        part: [base.get_submodule(end) for end in ends[part]] for part in ("tower", "projector")
    }


def base_of(model: PreTrainedModel) -> Any:
    """The module that holds the tower and has `get_image_features`."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "get_image_features") else model


def _deepstack_layers(model: PreTrainedModel) -> list[nn.Module]:
    indexes = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", ())
    return list(text_model.decoder_layers(model)[1])[: len(indexes or ())]


# ---- a row's images ------------------------------------------------------------------------------


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


def is_trained(model: PreTrainedModel) -> bool:
    """Whether something in a model's tower or projector is trained."""
    modules = [m for part in modules_of(model).values() for m in part]
    return any(p.requires_grad for m in modules for p in m.parameters()) or any(
        p.requires_grad for p in own_parameters(model)
    )


def unused_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of a tower that no feature passes through: the pooling head of SigLIP, whose
    output no text model reads; of LLaVA-OneVision, which reads hidden states, what comes behind
    them.
    """
    family = family_of(model.config)
    if family is None or model.config.vision_config.model_type != _SIGLIP:
        return []
    unused = ["head."]
    if family.features is _anyres_features:
        count, read = (
            model.config.vision_config.num_hidden_layers,
            model.config.vision_feature_layer,
        )
        last = max(i % (count + 1) for i in ([read] if isinstance(read, int) else read))
        unused += ["post_layernorm.", *(f"encoder.layers.{i}." for i in range(last, count))]
    return [
        p
        for tower in modules_of(model)["tower"]
        for name, p in tower.named_parameters()
        if any(f".{part}" in f".{name}" for part in unused)
    ]


def own_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters beside tower, projector and text decoder (`image_newline` of LLaVA-OneVision):
    they go with the projector.
    """
    return list(base_of(model)._parameters.values())


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


# ---- positions -----------------------------------------------------------------------------------


def empty_image(config: PreTrainedConfig) -> Images:
    """The smallest image that a model's tower takes, all zeros."""
    family, vision = family_of(config), config.vision_config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    if family is not None and family.features is _grid_features:
        merge = vision.spatial_merge_size
        numbers = channels * vision.temporal_patch_size * vision.patch_size**2
        return Images("image", (1, merge, merge), torch.zeros(merge * merge, numbers))
    size, patch = _two(vision.image_size), _two(vision.patch_size)
    grid = (1, size[0] // patch[0], size[1] // patch[1])
    return Images("image", grid, torch.zeros(1, channels, *size), size)


def _two(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def two_images(config: PreTrainedConfig) -> list[Images]:
    """Random images to try a model with, the first of many tokens. The same on every rank."""
    family, small = family_of(config), empty_image(config)
    draw = torch.Generator().manual_seed(1)
    grids = [small.grid, small.grid]
    if family is not None and family.features is _grid_features:
        merge = config.vision_config.spatial_merge_size
        grids = [(1, 4 * merge, 8 * merge), (1, merge, 3 * merge)]
    out = []
    for grid in grids:
        each = grid[1] * grid[2] // (small.grid[1] * small.grid[2])
        shape = (each * small.pixels.shape[0], *small.pixels.shape[1:])
        pixels = torch.randn(shape, generator=draw)
        out.append(dataclasses.replace(small, grid=grid, pixels=pixels))
    return out


def tokens_of(
    config: PreTrainedConfig,
    kind: Literal["image", "video"],
    grid: tuple[int, int, int],
    size: Sequence[int] = (),
) -> int:
    """Features that a model makes of an image, or of a video: its placeholders, without the text
    between a video's parts. Host only.

    Args:
        kind, grid, size: as of `Images`.
    """
    number, height, width = grid
    if config.model_type == "gemma3":
        return number * config.mm_tokens_per_image
    if config.model_type == "internvl":
        return number * int(height * config.downsample_ratio) * int(width * config.downsample_ratio)
    if config.model_type == "llava_onevision":
        if kind == "video":
            return number * -(-height // 2) * -(-width // 2) + 1
        return _tiled_tokens(config, size) if number > 1 else height * width + 1
    return number * height * width // config.vision_config.spatial_merge_size**2


def _tiled_tokens(config: PreTrainedConfig, size: Sequence[int]) -> int:
    """Of LLaVA-OneVision: an image in tiles, by the steps of its `pack_image_features`."""
    from transformers.models.llava_onevision import modeling_llava_onevision as llava

    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    given = torch.tensor(list(size))
    down, across = llava.get_anyres_image_grid_shape(
        given, config.image_grid_pinpoints, tower.image_size
    )
    canvas = torch.empty(1, side * down, side * across, device="meta")
    rows, columns = llava.unpad_image(canvas, given).shape[1:]
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return side**2 + rows * (columns + 1)


def patch_size(tower: Any) -> int:
    """Pixels of a patch's side."""
    return _two(tower.patch_size)[0]


def tower_sizes(tower: Any) -> tuple[int, int, int]:
    """Hidden size, width of the MLPs and number of layers of a tower's configuration."""
    hidden = getattr(tower, "embed_dim", None) or tower.hidden_size
    ratio = getattr(tower, "mlp_ratio", 4)
    inner = getattr(tower, "intermediate_size", None) or int(ratio * hidden)
    depth: Any = getattr(tower, "depth", None) or getattr(tower, "num_hidden_layers", 1)
    return int(hidden), int(inner), int(depth)


def image_token(config: PreTrainedConfig) -> int:
    """Id of the placeholder of images."""
    token: Any = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)  # type: ignore[arg-type]


def own_inputs(
    config: PreTrainedConfig,
    ids: Tensor,
    kinds: Tensor,
    images: Sequence[Images],
    seconds: Sequence[float] = (),
) -> dict[str, Any]:
    """What transformers' own forward of the whole model is given for one document, on the host.

    Args:
        ids, kinds: [L] token ids, and 1 for placeholders of images, 2 of videos.
        images: of the document, whole.
        seconds: between the parts of each video.
    """
    out: dict[str, Any] = {"input_ids": ids[None], "use_cache": False}
    family = family_of(config)
    if config.model_type == "internvl":  # it takes frames for images, in the order of the text
        if images:
            out["pixel_values"] = torch.cat([image.pixels for image in images])
        return out
    on_grid = family is not None and family.features is _grid_features
    for kind, name in (("image", ""), ("video", "_videos")):
        chosen = [image for image in images if image.kind == kind]
        if not chosen:
            continue
        out[f"pixel_values{name}"] = torch.cat([image.pixels for image in chosen])
        if on_grid:
            out[f"{kind}_grid_thw"] = torch.tensor([image.grid for image in chosen])
        elif config.model_type == "llava_onevision" and kind == "video":
            out["pixel_values_videos"] = torch.stack([image.pixels for image in chosen])
        elif config.model_type == "llava_onevision":
            out["image_sizes"] = torch.tensor([image.size for image in chosen])
            if any(image.grid[0] == 1 for image in chosen):
                # Of several images in a sample none is cut in tiles.
                out["batch_num_images"] = torch.tensor([max(2, len(chosen))])
    if on_grid and images:
        out["mm_token_type_ids"] = kinds[None]
        if config.model_type == "qwen2_5_vl" and seconds:
            out["second_per_grid_ts"] = torch.tensor(list(seconds))
    if has_blocks(config):
        out["token_type_ids"] = kinds[None]
    return out


def deeper_of(plan: RowPlan) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Local places of a row, and the features that are added there behind the first layers; empty
    where there are none.
    """
    return _deeper.get(plan, (torch.zeros(0, dtype=torch.int64), ()))


PositionRule = Callable[..., Tensor]


def position_rule(config: PreTrainedConfig) -> PositionRule | None:
    """How a model places the tokens of images in three dimensions; None where it has one dimension.

    Returns:
        (ids [L], kinds [L], image grids, video grids, seconds of a video's parts) -> [3, L] on the
        host, by the model's own `get_rope_index`. `kinds`: 0 of text, 1 of images, 2 of videos.
    """
    from transformers import AutoModel

    try:
        kind = AutoModel._model_mapping[type(config)]
    except KeyError:
        return None
    kind = kind[0] if isinstance(kind, (tuple, list)) else kind
    if not hasattr(kind, "get_rope_index"):
        return None
    # Only its configuration is asked for: no module is made.
    model = kind.__new__(kind)
    object.__setattr__(model, "config", config)
    takes_seconds = "second_per_grid_ts" in inspect.signature(kind.get_rope_index).parameters

    def rule(
        ids: Tensor,
        kinds: Tensor,
        images: Sequence[Sequence[int]],
        videos: Sequence[Sequence[int]],
        seconds: Sequence[float] = (),
    ) -> Tensor:
        given: dict[str, Any] = {
            "image_grid_thw": torch.tensor(images) if images else None,
            "video_grid_thw": torch.tensor(videos) if videos else None,
        }
        if takes_seconds and seconds:
            given["second_per_grid_ts"] = torch.tensor(seconds)
        places, _ = kind.get_rope_index(model, ids[None], mm_token_type_ids=kinds[None], **given)
        return places[:, 0]

    return rule
