"""What a family of vision-language models has: what stands in the text for an image or a video, how
many placeholder tokens it has, and the tensors that the model's own processor makes of it.

Sizes are arithmetic on width and height, so that nothing is decoded twice; what a processor makes
of the pixels has the same sizes, which `load` checks. Texts are LLaMA-Factory's (0.9.5); of a
family that it lacks they are the model's own processor's.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longfactory.data.errors import BadRow
from longfactory.data.media.images import Size, steps_to_size
from longfactory.errors import DataError


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

    def check(self, config: dict[str, Any]) -> None:
        """Compares the processor with the model that is to see its images.

        Args:
            config: of config.json, whole.
        Raises:
            DataError: the processor's files belong to another model.
        """
        del config

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


def disagree(what: str, processor: Any, model: Any) -> DataError:
    """The error for a size that the processor and the model must agree on."""
    return DataError(
        f"The model's image processor has {what} {processor}, and the model {model}. Copy the"
        " processor's files that belong to the model."
    )


def normal(frame: Image.Image, size: Size, settings: dict[str, Any]) -> Tensor:
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
