"""What a model's configuration says of images, on the host: how many tokens they become, where
these stand, and what transformers' own forward is given of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .families import Images, family_of, grid_features, has_blocks


def empty_image(config: PreTrainedConfig) -> Images:
    """The smallest image that a model's tower takes, all zeros."""
    family, vision = family_of(config), config.vision_config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    if family is not None and family.features is grid_features:
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
    if family is not None and family.features is grid_features:
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
    on_grid = family is not None and family.features is grid_features
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
