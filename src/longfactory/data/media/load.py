"""Encoded media to tensors: what a rank's loader does with the units that it is dealt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from longfactory.data.errors import BadRow
from longfactory.data.media import images, videos
from longfactory.data.media.process import Processing
from longfactory.data.media.sources import read
from longfactory.data.media.units import Dealt, LoadedMedia, MediaReference, MediaUnit
from longfactory.data.row import Row
from longfactory.errors import DataError


@dataclasses.dataclass
class MediaLoading:
    """What a loader needs beside the rows: the processing, and `deal`, which says of a row what
    this rank runs. Both travel into worker processes.
    """

    processing: Processing
    deal: Callable[[Row], Sequence[Dealt]]

    def __call__(self, row: Row) -> Row:
        return load_dealt(row, self.deal(row), self.processing) if row.media else row


def load_dealt(row: Row, dealt: Sequence[Dealt], processing: Processing) -> Row:
    """The row with its `pixels`.

    Raises:
        DataError: media that could be read when they were tokenised cannot be read any more.
    """
    pixels = tuple(
        LoadedMedia(d, load_unit(row.media[d.unit], processing, d.first, d.last)) for d in dealt
    )
    return dataclasses.replace(row, pixels=pixels)


def load_unit(
    unit: MediaUnit, processing: Processing, first: int = 0, last: int | None = None
) -> dict[str, Tensor]:
    """The tensors of the steps [first, last) of a unit, as its model's own processor makes them:
    `pixel_values`, and what else its family needs. Of a video only these frames are decoded.

    Raises:
        DataError: the media are gone, have changed, or cannot be decoded.
    """
    last = unit.steps if last is None else last
    unit.features(first, last)  # whether it may be cut there
    try:
        if unit.kind == "video":
            tensors = {"pixel_values": _video(unit, processing, first, last)}
        else:
            tensors = _image(unit, processing, first, last)
    except (BadRow, OSError) as error:
        where = f" ({unit.place})" if unit.place else ""
        raise DataError(
            f"{unit.reference.describe()}{where} could be read when the data were tokenised, and"
            f" cannot be read now: {error}. Bring it back, or set overwrite_cache: true to tokenise"
            " again."
        ) from None
    return tensors


def _image(unit: MediaUnit, processing: Processing, first: int, last: int) -> dict[str, Tensor]:
    family = processing.family
    image = images.decode(read(unit.reference), unit.reference.describe())
    tensors = family.image_tensors(images.resized(image, family.image_sizes(image.size)))
    _check(tensors["pixel_values"], unit, unit.steps if unit.steps > 1 else unit.grid[0])
    if (first, last) != (0, unit.steps):
        each = tensors["pixel_values"].shape[0] // unit.steps
        tensors["pixel_values"] = tensors["pixel_values"][first * each : last * each].contiguous()
    return tensors


def _video(unit: MediaUnit, processing: Processing, first: int, last: int) -> Tensor:
    family, reference = processing.family, unit.reference
    each = frames_of_step(processing)
    frames = _frames(reference, first * each, last * each)
    sizes = family.frame_sizes(frames[0].size)
    frames = images.in_threads(lambda frame: images.resized(frame, sizes), frames)
    pixels = family.frame_tensors(frames, unit.grid)
    _check(pixels, unit, last - first)
    return pixels


def frames_of_step(processing: Processing) -> int:
    """Frames that make one step of a video."""
    return 2 if processing.family.even_frames else 1


def _frames(reference: MediaReference, first: int, last: int) -> list[Image.Image]:
    if reference.frames:
        return images.in_threads(
            lambda frame: images.decode(read(frame), frame.describe()),
            reference.frames[first:last],
        )
    encoded: bytes | str = reference.path
    if reference.data or reference.offset >= 0:
        encoded = read(reference)
    return videos.frames(
        encoded,
        reference.describe(),
        reference.sampled[first:last],
        reference.pts[first:last],
    )


def _check(pixels: Tensor, unit: MediaUnit, steps: int) -> None:
    """Raises BadRow where the processor made other sizes than were measured."""
    _, rows, columns = unit.grid
    expected = steps * rows * columns if pixels.dim() == 2 else steps
    if pixels.shape[0] != expected:
        raise BadRow(
            f"changed media: it has {pixels.shape[0]} patches or tiles, and had {expected}"
        )
