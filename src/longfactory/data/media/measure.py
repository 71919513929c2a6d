"""Media of a row, measured once when it is tokenised: what stands for each in the text, and the
unit that the token cache keeps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from longfactory.data.errors import BadRow
from longfactory.data.media import images, videos
from longfactory.data.media.family import Frames, Measured
from longfactory.data.media.load import frames_of_step
from longfactory.data.media.process import Processing
from longfactory.data.media.sources import read, reference_of
from longfactory.data.media.units import MediaReference, MediaUnit


@dataclasses.dataclass(frozen=True)
class Found:
    """One image or video of a row. `unit` has no spans yet; `notes` are what is not read of it."""

    measured: Measured
    unit: MediaUnit
    notes: tuple[str, ...] = ()


def measure(value: Any, kind: str, processing: Processing, place: str) -> Found:
    """Reads and checks one image or video of a row.

    Raises:
        BadRow: it cannot be used; see `sources`, `images`, `videos`, `families`.
    """
    reference = reference_of(value, processing)
    if kind == "image":
        if reference.frames:
            raise BadRow("unknown media: an image is a list, expected a path or bytes")
        measured, reference, notes = _image(reference, processing)
    else:
        measured, reference, notes = _video(reference, processing)
    unit = MediaUnit(
        "image" if kind == "image" else "video",
        reference,
        measured.grid,
        (),
        steps=measured.steps,
        even=measured.even,
        tail=measured.tail,
        sizes=measured.sizes,
        seconds_per_step=measured.seconds_per_step,
        place=place,
    )
    return Found(measured, unit, notes)


def _read(reference: MediaReference) -> bytes:
    try:
        return read(reference)
    except OSError as error:
        raise BadRow(
            f"missing media: {reference.describe()} cannot be read: {error.strerror or error}"
        ) from None


def _image(
    reference: MediaReference, processing: Processing
) -> tuple[Measured, MediaReference, tuple[str, ...]]:
    size, count = images.check(_read(reference), reference.describe())
    family = processing.family
    seen = [size, *family.image_sizes(size)][-1]
    notes = ("frames of an animated image after its first",) if count > 1 else ()
    return family.image(seen), reference, notes


def _video(
    reference: MediaReference, processing: Processing
) -> tuple[Measured, MediaReference, tuple[str, ...]]:
    family, keys = processing.family, processing.keys
    if not family.videos:
        raise BadRow(f"video: models of the family {family.name} take images alone")
    notes: tuple[str, ...] = ()
    if reference.frames:
        size, notes = _frame_size(reference)
        count, rate = len(reference.frames), keys.video_fps
        times = [float(i) for i in range(count)]
    else:
        whole: bytes | str = reference.data or reference.path
        facts = videos.measure(whole, reference.describe(), keys.video_fps, keys.video_maxlen)
        size, count = (facts.width, facts.height), len(facts.indices)
        rate = keys.video_fps if not facts.duration else count / facts.duration
        times = [i / (facts.rate or keys.video_fps) * keys.video_fps for i in facts.indices]
        reference = dataclasses.replace(reference, sampled=facts.indices, pts=facts.pts)
    if count % frames_of_step(processing):
        count += 1
        reference = _last_twice(reference)
    width, height = [size, *family.frame_sizes(size)][-1]
    # Rounded as LLaMA-Factory rounds: a time is first a number of frames at video_fps.
    seconds = tuple(time / keys.video_fps for time in times)
    frames = Frames(width, height, count, seconds, rate)
    return family.video(frames), reference, notes


def _frame_size(reference: MediaReference) -> tuple[images.Size, tuple[str, ...]]:
    """The one size of a video's frames, each of which is decoded once."""
    found = {images.check(_read(f), f.describe()) for f in reference.frames}
    sizes = {size for size, _ in found}
    if len(sizes) > 1:
        raise BadRow(f"broken video: its frames have different sizes: {sorted(sizes)[:3]}")
    animated = any(count > 1 for _, count in found)
    return sizes.pop(), ("frames of an animated image after its first",) if animated else ()


def _last_twice(reference: MediaReference) -> MediaReference:
    if reference.frames:
        return dataclasses.replace(reference, frames=(*reference.frames, reference.frames[-1]))
    pts = (*reference.pts, reference.pts[-1]) if reference.pts else ()
    return dataclasses.replace(
        reference, sampled=(*reference.sampled, reference.sampled[-1]), pts=pts
    )
