"""Families whose tower takes images of one size: Gemma 3, InternVL, LLaVA-OneVision, Mllama."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longfactory.data.media.family import Facts, Family, Frames, Measured, disagree, normal
from longfactory.data.media.images import Size
from longfactory.errors import DataError


class TileFamily(Family):
    """Families whose tower takes images of one size: an image is one of them, or is cut into
    several.
    """

    def check(self, config: dict[str, Any]) -> None:
        found = (config.get("vision_config") or {}).get("image_size")
        if found is None:
            return
        sides = tuple(found) if isinstance(found, (list, tuple)) else (found, found)
        if sides != _sides(self.processor):
            raise disagree("the size", _sides(self.processor), sides)

    def tile(self) -> tuple[int, int]:
        """(patches down, patches across) of a tile."""
        size = _sides(self.processor)
        vision = self.facts.config.get("vision_config") or {}
        patch = vision.get("patch_size", 14)
        down, across = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        return size[0] // down, size[1] // across

    def image_tensors(self, image: Image.Image) -> dict[str, Tensor]:
        return {"pixel_values": _tiles(self._plain_image(image, **self.options())["pixel_values"])}

    def options(self) -> dict[str, Any]:
        """What the run's keys change of the processor's settings."""
        return {}


def _sides(processor: Any) -> tuple[int, int]:
    """(height, width) to which an image processor resizes."""
    size = processor.size
    found = size if isinstance(size, dict) else vars(size)
    edge = found.get("shortest_edge")
    height, width = found.get("height") or edge, found.get("width") or edge
    if height is None or width is None:
        raise DataError(f"The model's image processor has the size {found}, expected one size.")
    return int(height), int(width)


def _tiles(pixels: Any) -> Tensor:
    """[tiles, C, H, W] float32 of what a processor returns for one image."""
    if isinstance(pixels, (list, tuple)):
        pixels = torch.stack([torch.as_tensor(np.asarray(p)) for p in pixels])
    while pixels.dim() > 4:
        pixels = pixels[0]
    return pixels.float()


class Gemma3(TileFamily):
    """gemma3: every image is 256 tokens; with image_do_pan_and_scan, crops of long ones too."""

    name = "gemma3"
    videos = False

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("image_token", "<image_soft_token>")

    @property
    def begin(self) -> str:
        return self.facts.tokens.get("boi_token", "<start_of_image>")

    @property
    def written_image(self) -> str:
        return self.begin

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return _agreed(
            self.facts, "image_seq_length", self.facts.config.get("mm_tokens_per_image"), 256
        )

    def options(self) -> dict[str, Any]:
        if not self.keys.image_do_pan_and_scan:
            return {}
        return {
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        }

    def image(self, size: Size) -> Measured:
        end = self.facts.tokens.get("eoi_token", "<end_of_image>")
        whole = f"\n\n{self.begin}{self.image_token * self.length}{end}\n\n"
        crops, text = 0, whole
        if self.keys.image_do_pan_and_scan:
            options = {k: v for k, v in self.options().items() if k != "do_pan_and_scan"}
            probe = np.empty((1, size[1], size[0]), np.uint8)
            crops = len(self.processor.pan_and_scan(image=probe, **options))
        if crops:
            text = (
                f"Here is the original image {whole} and here are some crops to help you see"
                f" better {' '.join([whole] * crops)}"
            )
        count = 1 + crops
        return Measured(
            text, self.image_token, (self.length,) * count, (count, *self.tile()), steps=count
        )


class InternVL(TileFamily):
    """internvl: tiles of one size; a frame of a video is one tile."""

    name = "intern_vl"

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("context_image_token", "<IMG_CONTEXT>")

    @property
    def written_video(self) -> str:
        return self.facts.tokens.get("video_token", "<video>")

    @property
    def length(self) -> int:
        """Tokens of a tile."""
        return _agreed(
            self.facts, "image_seq_length", self.facts.config.get("image_seq_length"), 256
        )

    def check(self, config: dict[str, Any]) -> None:
        """Its tower takes any size; the tokens of a tile follow from it."""
        ratio = config.get("downsample_ratio")
        made = None if ratio is None else round(math.prod(self.tile()) * float(ratio) ** 2)
        if made not in (None, self.length):
            raise disagree("tokens for a tile:", self.length, made)

    def options(self) -> dict[str, Any]:
        if not self.keys.crop_to_patches:
            return {}
        return {"crop_to_patches": True, "max_patches": 12, "min_patches": 1}

    def _framed(self, tiles: int) -> str:
        begin = self.facts.tokens.get("start_image_token", "<img>")
        end = self.facts.tokens.get("end_image_token", "</img>")
        return f"{begin}{self.image_token * (self.length * tiles)}{end}"

    def image(self, size: Size) -> Measured:
        options = {"crop_to_patches": bool(self.processor.crop_to_patches)} | self.options()
        tiles = int(self.processor.get_number_of_image_patches(size[1], size[0], options))
        return Measured(
            self._framed(tiles),
            self.image_token,
            (self.length * tiles,),
            (tiles, *self.tile()),
            steps=tiles,
        )

    def video(self, frames: Frames) -> Measured:
        count = frames.count
        return Measured(
            "\n".join(f"Frame{i + 1}: {self._framed(1)}" for i in range(count)),
            self.image_token,
            (self.length,) * count,
            (count, *self.tile()),
            steps=count,
            seconds_per_step=1 / frames.rate,
        )

    def frame_tensors(self, frames: Sequence[Image.Image], grid: Sequence[int]) -> Tensor:
        options = self.options() | {"crop_to_patches": False}
        made = self.processor(images=list(frames), return_tensors="pt", **options)
        return _tiles(made["pixel_values"])


class LlavaOnevision(TileFamily):
    """llava_onevision: an image and its tiles, without the padding; a frame is pooled to a quarter
    of a tile, and a video ends with one token more.
    """

    name = "llava_onevision"

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("image_token", "<image>")

    @property
    def video_token(self) -> str:
        return self.facts.tokens.get("video_token", "<video>")

    @property
    def length(self) -> int:
        """Tokens of a tile."""
        found = self.facts.processor.get("num_image_tokens")
        return int(found) if found is not None else math.prod(self.tile())

    def image(self, size: Size) -> Measured:
        from transformers.image_processing_utils import select_best_resolution

        width, height = size
        side = math.isqrt(self.length)
        tile = _sides(self.processor)
        best = select_best_resolution([height, width], self.processor.image_grid_pinpoints)
        down, across = best[0] // tile[0], best[1] // tile[1]
        rows, columns = _without_padding(height, width, side * down, side * across)
        limit = str(self.facts.processor.get("vision_aspect_ratio", "anyres_max_9"))
        ratio = math.sqrt(rows * columns / (int(limit.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        tokens = rows * columns + rows + self.length
        if self.facts.processor.get("vision_feature_select_strategy", "full") == "default":
            tokens -= 1
        return Measured(
            self.image_token * tokens,
            self.image_token,
            (tokens,),
            (down * across + 1, *self.tile()),
            steps=down * across + 1,
            even=False,
            sizes=(height, width),
        )

    def video(self, frames: Frames) -> Measured:
        side = math.ceil(math.isqrt(self.length) / 2)
        tokens = frames.count * side * side + 1
        return Measured(
            self.video_token * tokens,
            self.video_token,
            (tokens,),
            (frames.count, *self.tile()),
            steps=frames.count,
            tail=1,
            seconds_per_step=1 / frames.rate,
        )

    def frame_tensors(self, frames: Sequence[Image.Image], grid: Sequence[int]) -> Tensor:
        height, width = _sides(self.processor)
        settings = {
            "image_mean": list(self.processor.image_mean),
            "image_std": list(self.processor.image_std),
        } | {k: v for k, v in self.facts.video.items() if v is not None}
        return torch.stack([normal(f, (width, height), settings) for f in frames])


def _without_padding(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of features of an image padded to a canvas of `rows` x `columns` that are not
    padding.
    """
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * padding


class Mllama(TileFamily):
    """mllama: an image is one token of the text, which attends to its tiles."""

    name = "mllama"
    videos = False

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("image_token", "<|image|>")

    def image(self, size: Size) -> Measured:
        from transformers.models.mllama.image_processing_pil_mllama import (
            get_all_supported_aspect_ratios,
            get_optimal_tiled_canvas,
        )

        tile, most = _sides(self.processor)[0], int(self.processor.max_image_tiles)
        canvas = get_optimal_tiled_canvas(size[1], size[0], most, tile)
        ratio = (int(canvas[0]) // tile, int(canvas[1]) // tile)
        tiles = ratio[0] * ratio[1]
        number = get_all_supported_aspect_ratios(most).index(ratio) + 1
        return Measured(
            self.image_token,
            self.image_token,
            (1,),
            (tiles, *self.tile()),
            even=False,
            sizes=(number, tiles),
        )

    def image_tensors(self, image: Image.Image) -> dict[str, Tensor]:
        made = self._plain_image(image)
        tiles = int(np.asarray(made["num_tiles"]).reshape(-1)[0])
        return {
            "pixel_values": _tiles(made["pixel_values"])[:tiles],
            "aspect_ratio_ids": torch.as_tensor(made["aspect_ratio_ids"]).reshape(-1),
            "aspect_ratio_mask": torch.as_tensor(made["aspect_ratio_mask"]).reshape(-1),
        }


def _agreed(facts: Facts, key: str, config: int | None, default: int) -> int:
    """A number of tokens that the processor and the model must agree on.

    Raises:
        DataError: they do not.
    """
    found = facts.processor.get(key)
    if found is not None and config is not None and int(found) != int(config):
        raise DataError(
            f"processor_config.json says {key} {found}, and the model makes {config} tokens of an"
            " image. Copy the processor's files that belong to the model."
        )
    if found is not None:
        return int(found)
    return default if config is None else int(config)
