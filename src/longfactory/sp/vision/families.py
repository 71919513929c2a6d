"""Families of models with images: what runs their towers, and which of their modules and parameters
images pass through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..pinned import copied


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


def grid_features(model: Any, images: Sequence[Images], device: torch.device) -> Tensor:
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


def anyres_features(model: Any, images: Sequence[Images], device: torch.device) -> Tensor:
    """Of LLaVA-OneVision: an image of several tiles is put together, cut to its own shape and gets
    a token at the end of each line; a video's frames are pooled, with one token at its end.
    """
    out = []
    for image in images:
        pixels = image.pixels.to(device, non_blocking=True)
        if image.kind == "video":
            frames, height, width = image.grid
            features = model.get_video_features(pixels[None], return_dict=True).pooler_output[0]
            # Newer versions of transformers have the last token among the features, 5.17 has not.
            out.append(features[: frames * -(-height // 2) * -(-width // 2)])
            # Of no rows too: every rank has a gradient for it, be it zero.
            out.append(model.image_newline[None][: int(image.ends)])
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
        grid_features,
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
        anyres_features,
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


def base_of(model: PreTrainedModel) -> Any:
    """The module that holds the tower and has `get_image_features`."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "get_image_features") else model


def modules_of(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The modules that images pass through before the text decoder: `tower` and `projector`. Of
    some families the projector lies in the tower, and is in both.
    """
    family, base = family_of(model.config), base_of(model)
    ends = {"tower": (), "projector": ()} if family is None else vars(family)
    return {
        part: [base.get_submodule(end) for end in ends[part]] for part in ("tower", "projector")
    }


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
    if family.features is anyres_features:
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
