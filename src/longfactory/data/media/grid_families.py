"""Families whose tower takes a grid of patches: Qwen2-VL, Qwen3-VL, GLM-4V and their kin."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from longfactory.data.errors import BadRow
from longfactory.data.media.family import (
    Facts,
    Family,
    Frames,
    Measured,
    MediaKeys,
    disagree,
    normal,
)
from longfactory.data.media.images import Size, in_threads
from longfactory.errors import DataError

TEMPORAL_PATCH = 2
"""Frames that Qwen's towers and their kin take together."""
OF_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""Colours as CLIP's tower takes them."""


class GridFamily(Family):
    """Qwen2-VL and its kin: an image becomes a grid of patches, of which `merge_size` squared make
    a token; a video, a grid for each two frames.
    """

    widens = True
    even_frames = True
    video_defaults: ClassVar[dict[str, Any]]
    image_word: ClassVar[str]
    """The image token of a tokenizer that does not name it."""
    frame: ClassVar[tuple[str, str]]
    """What stands around the tokens of an image."""

    def __init__(self, processor: Any, facts: Facts, keys: MediaKeys):
        super().__init__(processor, facts, keys)
        self.patch, self.merge = int(processor.patch_size), int(processor.merge_size)
        found = self.video_defaults | {k: v for k, v in facts.video.items() if v is not None}
        size = dict(found["size"])
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if found.get(key) is not None:
                size[edge] = found[key]
        if found.get("cap_pixels_per_frame"):
            raise DataError(
                "The model's video processor has cap_pixels_per_frame: true, which LLaMA-Factory's"
                " sizes do not know. Set it to false in video_preprocessor_config.json."
            )
        if found["temporal_patch_size"] != TEMPORAL_PATCH:
            raise DataError(
                f"The model's video processor has temporal_patch_size"
                f" {found['temporal_patch_size']}, expected {TEMPORAL_PATCH}."
            )
        self.video_patch, self.video_merge = int(found["patch_size"]), int(found["merge_size"])
        self.video_size = (int(size["shortest_edge"]), int(size["longest_edge"]))
        self.video_settings = found

    def check(self, config: dict[str, Any]) -> None:
        vision = config.get("vision_config") or {}
        found = {"patch_size": [self.patch], "spatial_merge_size": [self.merge]}
        if self.facts.video:
            found["patch_size"].append(self.video_patch)
            found["spatial_merge_size"].append(self.video_merge)
        for name, sizes in found.items():
            for size in sizes:
                if vision.get(name) not in (None, size):
                    raise disagree(name, size, vision[name])

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("image_token", self.image_word)

    @property
    def written_image(self) -> str:
        return self._framed(self.image_token)

    def _framed(self, text: str) -> str:
        return text.join(self.frame)

    def image(self, size: Size) -> Measured:
        grid = self.image_grid(size)
        tokens = math.prod(grid) // self.merge**2
        return Measured(self._framed(self.image_token * tokens), self.image_token, (tokens,), grid)

    def _video(
        self, frames: Frames, text: str, token: str, tokens: tuple[int, ...], grid: Any
    ) -> Measured:
        return Measured(
            text,
            token,
            tokens,
            grid,
            steps=grid[0],
            seconds_per_step=TEMPORAL_PATCH / frames.rate,
        )

    @abc.abstractmethod
    def image_resize(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which the processor resizes an image."""

    @abc.abstractmethod
    def frame_resize(self, count: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which the processor resizes the frames of a video."""

    def image_grid(self, size: Size) -> tuple[int, int, int]:
        height, width = _allowed(lambda: self.image_resize(size[1], size[0]), size)
        return 1, height // self.patch, width // self.patch

    def video_grid(self, frames: Frames) -> tuple[int, int, int]:
        height, width = _allowed(
            lambda: self.frame_resize(frames.count, frames.height, frames.width),
            (frames.width, frames.height),
        )
        steps = -(-frames.count // TEMPORAL_PATCH)
        return steps, height // self.video_patch, width // self.video_patch

    def image_tensors(self, image: Image.Image) -> dict[str, Tensor]:
        return {"pixel_values": self._plain_image(image)["pixel_values"]}

    def frame_tensors(self, frames: Sequence[Image.Image], grid: Sequence[int]) -> Tensor:
        _, rows, columns = grid
        width, height = columns * self.video_patch, rows * self.video_patch
        steps, numbers = len(frames) // TEMPORAL_PATCH, 3 * TEMPORAL_PATCH * self.video_patch**2
        # Step by step into the tensor of all: a long video is not in memory twice.
        out = torch.empty(steps, rows * columns, numbers)

        def write(step: int) -> None:
            pair = frames[step * TEMPORAL_PATCH : (step + 1) * TEMPORAL_PATCH]
            pixels = torch.stack([normal(f, (width, height), self.video_settings) for f in pair])
            out[step] = patches_of(pixels, self.video_patch, self.video_merge)

        in_threads(write, range(steps))
        return out.flatten(0, 1)


def patches_of(pixels: Tensor, patch: int, merge: int) -> Tensor:
    """Frames as patches in the order in which the towers take them.

    [2 t, C, h * patch, w * patch] -> [t * h * w, C * 2 * patch * patch], patches that are merged
    next to each other.
    """
    frames, channels, height, width = pixels.shape
    steps, rows, columns = frames // TEMPORAL_PATCH, height // patch, width // patch
    # [2 t, C, H, W] -> [t, 2, C, h/m, m, p, w/m, m, p]
    split = pixels.reshape(
        *(steps, TEMPORAL_PATCH, channels),
        *(rows // merge, merge, patch, columns // merge, merge, patch),
    )
    # -> [t, h/m, w/m, m, m, C, 2, p, p]
    ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(
        steps * rows * columns, channels * TEMPORAL_PATCH * patch * patch
    ).contiguous()


class Qwen2VL(GridFamily):
    """qwen2_vl, qwen2_5_vl."""

    name = "qwen2_vl"
    image_word = "<|image_pad|>"
    frame = ("<|vision_start|>", "<|vision_end|>")
    video_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        **OF_CLIP,
    }

    @property
    def video_token(self) -> str:
        return self.facts.tokens.get("video_token", "<|video_pad|>")

    @property
    def written_video(self) -> str:
        return self._framed(self.video_token)

    def image_resize(self, height: int, width: int) -> tuple[int, int]:
        least, most = _edges(self.processor)
        return resize_to_grid(height, width, self.patch * self.merge, least, most)

    def frame_resize(self, count: int, height: int, width: int) -> tuple[int, int]:
        least, most = self.video_size
        return resize_to_grid(height, width, self.video_patch * self.video_merge, least, most)

    def video(self, frames: Frames) -> Measured:
        grid = self.video_grid(frames)
        tokens = math.prod(grid) // self.merge**2
        text = self._framed(self.video_token * tokens)
        return self._video(frames, text, self.video_token, (tokens,), grid)


class Qwen3VL(Qwen2VL):
    """qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe: each two frames of a video after their time."""

    name = "qwen3_vl"
    video_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }

    def frame_resize(self, count: int, height: int, width: int) -> tuple[int, int]:
        factor = self.video_patch * self.video_merge
        return resize_to_volume(count, height, width, factor, *self.video_size)

    def video(self, frames: Frames) -> Measured:
        grid = self.video_grid(frames)
        tokens = grid[1] * grid[2] // self.video_merge**2
        placeholders = self._framed(self.video_token * tokens)
        times = list(frames.times) + [frames.times[-1]] * (-len(frames.times) % TEMPORAL_PATCH)
        middle = [(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)]
        text = "".join(f"<{seconds:.1f} seconds>{placeholders}" for seconds in middle)
        return self._video(frames, text, self.video_token, (tokens,) * grid[0], grid)


class GLM4V(GridFamily):
    """glm4v, glm4v_moe."""

    name = "glm4v"
    image_word = "<|image|>"
    frame = ("<|begin_of_image|>", "<|end_of_image|>")
    video_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000},
        **OF_CLIP,
    }

    @property
    def written_video(self) -> str:
        token = self.facts.tokens.get("video_token", "<|video|>")
        return f"<|begin_of_video|>{token}<|end_of_video|>"

    def image_resize(self, height: int, width: int) -> tuple[int, int]:
        least, most = _edges(self.processor)
        factor = self.patch * self.merge
        return resize_to_volume(TEMPORAL_PATCH, height, width, factor, least, most)

    def frame_resize(self, count: int, height: int, width: int) -> tuple[int, int]:
        factor = self.video_patch * self.video_merge
        return resize_to_volume(count, height, width, factor, *self.video_size)

    def video(self, frames: Frames) -> Measured:
        grid = self.video_grid(frames)
        tokens = grid[1] * grid[2] // self.video_merge**2
        placeholders = self._framed(self.image_token * tokens)
        times = list(frames.times[::2]) or [0.0]
        times += [times[-1]] * (grid[0] - len(times))
        parts = "".join(f"{placeholders}{int(seconds)}" for seconds in times[: grid[0]])
        text = f"<|begin_of_video|>{parts}<|end_of_video|>"
        return self._video(frames, text, self.image_token, (tokens,) * grid[0], grid)


def _edges(processor: Any) -> tuple[int, int]:
    """The range of pixels of an image processor."""
    size = processor.size
    found = size if isinstance(size, dict) else vars(size)
    return int(found["shortest_edge"]), int(found["longest_edge"])


def _allowed(resize: Callable[[], tuple[int, int]], size: Size) -> tuple[int, int]:
    try:
        return resize()
    except ValueError as error:
        raise BadRow(
            f"size: the model's processor refuses {size[0]} x {size[1]} pixels: {error}"
        ) from None


def resize_to_grid(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """(height, width), multiples of `factor` with about the same ratio and `least` to `most`
    pixels: the rule of Qwen2-VL.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    _check_ratio(height, width)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > most:
        scale = math.sqrt((height * width) / most)
        return _floored(height / scale, factor), _floored(width / scale, factor)
    if rows * columns < least:
        scale = math.sqrt(least / (height * width))
        return _ceiled(height * scale, factor), _ceiled(width * scale, factor)
    return rows, columns


def resize_to_volume(
    count: int, height: int, width: int, factor: int, least: int, most: int
) -> tuple[int, int]:
    """The same, with `least` to `most` pixels in all `count` frames together: the rule of Qwen3-VL
    and GLM-4V.

    Raises:
        ValueError: fewer frames than a temporal patch has, or sides as in `resize_to_grid`.
    """
    if count < TEMPORAL_PATCH:
        raise ValueError(f"{count} frames, expected {TEMPORAL_PATCH} or more")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_ratio(height, width)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    steps = round(count / TEMPORAL_PATCH) * TEMPORAL_PATCH
    if steps * rows * columns > most:
        scale = math.sqrt((count * height * width) / most)
        return _floored(height / scale, factor), _floored(width / scale, factor)
    if steps * rows * columns < least:
        scale = math.sqrt(least / (count * height * width))
        return _ceiled(height * scale, factor), _ceiled(width * scale, factor)
    return rows, columns


def _check_ratio(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        raise ValueError(f"one side is {ratio:.0f} times the other, expected at most 200")


def _floored(length: float, factor: int) -> int:
    return max(factor, math.floor(length / factor) * factor)


def _ceiled(length: float, factor: int) -> int:
    return math.ceil(length / factor) * factor
