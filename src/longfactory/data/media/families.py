"""Families of vision-language models: what stands in the text for an image or a video, how many
placeholder tokens it has, and the tensors that the model's own processor makes of it.

Sizes are arithmetic on width and height, so that nothing is decoded twice; what a processor makes
of the pixels has the same sizes, which `load` checks. Texts are LLaMA-Factory's (0.9.5); of a
family that it lacks they are the model's own processor's.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longfactory.data.errors import BadRow
from longfactory.data.media.images import Size, steps_to_size
from longfactory.errors import DataError

TEMPORAL_PATCH = 2
"""Frames that Qwen's towers and their kin take together."""


@dataclasses.dataclass(frozen=True)
class MediaKeys:
    """LLaMA-Factory's keys of images and videos, with its defaults."""

    image_max_pixels: int = 768 * 768
    image_min_pixels: int = 32 * 32
    image_do_pan_and_scan: bool = False
    crop_to_patches: bool = False
    video_max_pixels: int = 256 * 256
    video_min_pixels: int = 16 * 16
    video_fps: float = 2.0
    video_maxlen: int = 128


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model's folder says beside the settings of its image processor.

    Attributes:
        processor: of processor_config.json, its own values.
        video: settings of its video processor; empty where it has none.
        config: of config.json.
        tokens: the placeholder tokens that its tokenizer names, by role.
    """

    processor: dict[str, Any] = dataclasses.field(default_factory=dict)
    video: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Frames:
    """What is known of a video before its frames are processed.

    Attributes:
        width, height: of its frames.
        count: frames that are used.
        times: seconds of each frame as timestamps have them, [count].
        rate: frames used a second.
    """

    width: int
    height: int
    count: int
    times: tuple[float, ...]
    rate: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an image or a video becomes in the text. See `units.MediaUnit`; `runs` are the tokens of
    each run of placeholders `token` in `text`.
    """

    text: str
    token: str
    runs: tuple[int, ...]
    grid: tuple[int, int, int]
    steps: int = 1
    even: bool = True
    tail: int = 0
    sizes: tuple[int, ...] = ()
    seconds_per_step: float | None = None


class Family(abc.ABC):
    """One family, for one model and one run.

    Args:
        processor: the model's own image processor, PIL back end.
        facts: what its folder says.
        keys: the run's.
    """

    name: ClassVar[str]
    videos: ClassVar[bool] = True
    widens: ClassVar[bool] = False
    """Whether LLaMA-Factory widens narrow images for it."""
    even_frames: ClassVar[bool] = False
    """Whether the last frame of an odd number stands twice."""

    def __init__(self, processor: Any, facts: Facts, keys: MediaKeys):
        self.processor, self.facts, self.keys = processor, facts, keys

    # -- tokens ------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def image_token(self) -> str:
        """The placeholder token of images."""

    @property
    def video_token(self) -> str:
        """The placeholder token of videos."""
        return self.image_token

    @property
    def written_image(self) -> str:
        """What the model's own chat template writes where an image stands."""
        return self.image_token

    @property
    def written_video(self) -> str:
        """What the model's own chat template writes where a video stands."""
        return self.video_token

    # -- sizes -------------------------------------------------------------------------------------

    def image_sizes(self, size: Size) -> list[Size]:
        """The sizes through which an image of (width, height) goes before its processor."""
        keys = self.keys
        return steps_to_size(size, keys.image_max_pixels, keys.image_min_pixels, self.widens)

    def frame_sizes(self, size: Size) -> list[Size]:
        """The same, of a video's frames."""
        keys = self.keys
        return steps_to_size(size, keys.video_max_pixels, keys.video_min_pixels, self.widens)

    @abc.abstractmethod
    def image(self, size: Size) -> Measured:
        """An image whose (width, height) are those that its processor sees.

        Raises:
            BadRow: its processor would refuse the size.
        """

    def video(self, frames: Frames) -> Measured:
        """A video whose frames have the sizes that its processor sees.

        Raises:
            BadRow: the family has no videos, or its processor would refuse the size.
        """
        raise BadRow(f"video: models of the family {self.name} take images alone")

    # -- tensors -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def image_tensors(self, image: Image.Image) -> dict[str, Tensor]:
        """What the processor makes of one image: `pixel_values` with its steps along the first
        dimension (or patches, step by step), and what else the family needs.
        """

    def frame_tensors(self, frames: Sequence[Image.Image], grid: Sequence[int]) -> Tensor:
        """`pixel_values` of a part of a video. [frames of whole steps] images of the size that the
        processor sees -> patches or frames along the first dimension; `grid` is the whole video's.
        """
        raise BadRow(f"video: models of the family {self.name} take images alone")

    def _plain_image(self, image: Image.Image, **options: Any) -> dict[str, Any]:
        return dict(self.processor(images=[image], return_tensors="pt", **options))


# -- patches in a grid -----------------------------------------------------------------------------


class GridFamily(Family):
    """Qwen2-VL and its kin: an image becomes a grid of patches, of which `merge_size` squared make
    a token; a video, a grid for each two frames.
    """

    widens = True
    even_frames = True
    video_defaults: ClassVar[dict[str, Any]]

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
        pixels = torch.stack([_normal(f, (width, height), self.video_settings) for f in frames])
        return patches_of(pixels, self.video_patch, self.video_merge)


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
    video_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("image_token", "<|image_pad|>")

    @property
    def video_token(self) -> str:
        return self.facts.tokens.get("video_token", "<|video_pad|>")

    @property
    def written_image(self) -> str:
        return self._framed(self.image_token)

    @property
    def written_video(self) -> str:
        return self._framed(self.video_token)

    @staticmethod
    def _framed(text: str) -> str:
        return f"<|vision_start|>{text}<|vision_end|>"

    def image_resize(self, height: int, width: int) -> tuple[int, int]:
        least, most = _edges(self.processor)
        return resize_to_grid(height, width, self.patch * self.merge, least, most)

    def frame_resize(self, count: int, height: int, width: int) -> tuple[int, int]:
        least, most = self.video_size
        return resize_to_grid(height, width, self.video_patch * self.video_merge, least, most)

    def image(self, size: Size) -> Measured:
        grid = self.image_grid(size)
        tokens = math.prod(grid) // self.merge**2
        return Measured(self._framed(self.image_token * tokens), self.image_token, (tokens,), grid)

    def video(self, frames: Frames) -> Measured:
        grid = self.video_grid(frames)
        tokens = math.prod(grid) // self.merge**2
        return Measured(
            self._framed(self.video_token * tokens),
            self.video_token,
            (tokens,),
            grid,
            steps=grid[0],
            seconds_per_step=TEMPORAL_PATCH / frames.rate,
        )


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
        return Measured(
            "".join(f"<{seconds:.1f} seconds>{placeholders}" for seconds in middle),
            self.video_token,
            (tokens,) * grid[0],
            grid,
            steps=grid[0],
            seconds_per_step=TEMPORAL_PATCH / frames.rate,
        )


class GLM4V(GridFamily):
    """glm4v, glm4v_moe."""

    name = "glm4v"
    video_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }

    @property
    def image_token(self) -> str:
        return self.facts.tokens.get("image_token", "<|image|>")

    @property
    def written_image(self) -> str:
        return self._framed(self.image_token)

    @property
    def written_video(self) -> str:
        token = self.facts.tokens.get("video_token", "<|video|>")
        return f"<|begin_of_video|>{token}<|end_of_video|>"

    @staticmethod
    def _framed(text: str) -> str:
        return f"<|begin_of_image|>{text}<|end_of_image|>"

    def image_resize(self, height: int, width: int) -> tuple[int, int]:
        least, most = _edges(self.processor)
        factor = self.patch * self.merge
        return resize_to_volume(TEMPORAL_PATCH, height, width, factor, least, most)

    def frame_resize(self, count: int, height: int, width: int) -> tuple[int, int]:
        factor = self.video_patch * self.video_merge
        return resize_to_volume(count, height, width, factor, *self.video_size)

    def image(self, size: Size) -> Measured:
        grid = self.image_grid(size)
        tokens = math.prod(grid) // self.merge**2
        return Measured(self._framed(self.image_token * tokens), self.image_token, (tokens,), grid)

    def video(self, frames: Frames) -> Measured:
        grid = self.video_grid(frames)
        tokens = grid[1] * grid[2] // self.video_merge**2
        placeholders = self._framed(self.image_token * tokens)
        times = list(frames.times[::2]) or [0.0]
        times += [times[-1]] * (grid[0] - len(times))
        parts = "".join(f"{placeholders}{int(seconds)}" for seconds in times[: grid[0]])
        return Measured(
            f"<|begin_of_video|>{parts}<|end_of_video|>",
            self.image_token,
            (tokens,) * grid[0],
            grid,
            steps=grid[0],
            seconds_per_step=TEMPORAL_PATCH / frames.rate,
        )


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


def _normal(frame: Image.Image, size: Size, settings: dict[str, Any]) -> Tensor:
    """[C, height, width] float32: a frame resized to (width, height), with the mean and deviation
    of its processor.
    """
    if frame.size != size:
        frame = frame.resize(size, Image.Resampling(settings.get("resample", 3)))
    pixels = torch.from_numpy(np.array(frame, dtype=np.float32)).permute(2, 0, 1)
    if settings.get("do_rescale", True):
        pixels = pixels * settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True):
        mean, std = (
            torch.tensor(settings[k], dtype=torch.float32) for k in ("image_mean", "image_std")
        )
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    return pixels


# -- tiles of one size -----------------------------------------------------------------------------


class TileFamily(Family):
    """Families whose tower takes images of one size: an image is one of them, or is cut into
    several.
    """

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
        return torch.stack([_normal(f, (width, height), settings) for f in frames])


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


FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (Qwen2VL, Qwen3VL, GLM4V, Gemma3, InternVL, LlavaOnevision, Mllama)
}
OF_MODEL = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v",
    "gemma3": "gemma3",
    "internvl": "intern_vl",
    "llava_onevision": "llava_onevision",
    "mllama": "mllama",
}
"""The family of each type of model (config.json: model_type)."""
OF_TEMPLATE = {
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_nothink": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_nothink": "qwen3_vl",
    "qwen3_6": "qwen3_vl",
    "glm4v": "glm4v",
    "glm4_5v": "glm4v",
    "gemma3": "gemma3",
    "intern_vl": "intern_vl",
    "intern_s1": "intern_vl",
    "llava_next_qwen": "llava_onevision",
    "mllama": "mllama",
}
"""The family whose media each template writes."""
