"""Video files: which frames are used, and the frames themselves, with PyAV (extra: vision)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from longfactory.data.errors import BadRow
from longfactory.errors import DataError

ABSENT = 2
"""Frames that a container may promise and not hold: edit lists cut off as many."""


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What tokenising learns of a video.

    Attributes:
        width, height: of its frames.
        indices: the frames that are used, from 0, ascending.
        pts: their presentation times in the stream's unit, by which they are found again; empty
            where a frame has none.
        rate: frames a second, as the container says; None where it does not.
        duration: seconds, as the container says; None where it does not.
    """

    width: int
    height: int
    indices: tuple[int, ...]
    pts: tuple[int, ...]
    rate: float | None
    duration: float | None


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"Videos are read with PyAV, which cannot be imported ({error}). Install it: pip"
            " install 'longfactory[vision]'."
        ) from error
    av.logging.set_level(None)  # what it has to say of damaged files is in its errors
    return av


@contextlib.contextmanager
def _opened(data: bytes | str, name: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream) of a file or of its bytes.

    Raises:
        BadRow: it cannot be read, or holds no video.
    """
    av = _av()
    try:
        with av.open(io.BytesIO(data) if isinstance(data, bytes) else data, "r") as container:
            stream = next((s for s in container.streams if s.type == "video"), None)
            if stream is None:
                raise BadRow(f"broken video: {name} holds no video stream")
            stream.thread_type = "AUTO"
            yield container, stream
    # what a damaged container or a file system makes of the library
    except (av.FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(f"broken video: {name} cannot be read: {reason}") from None


def sample(total: int, seconds: float | None, fps: float, most: int) -> list[int]:
    """The frames that LLaMA-Factory uses of a video: `fps` a second, at most `most`, evenly spaced
    from the first to the last.

    Args:
        total: frames of the video; 0 where its container does not say.
        seconds: its duration; None where its container does not say.
    """
    if total == 0:
        return list(range(most))
    wanted = total if seconds is None else max(1, math.floor(seconds * fps))
    return np.linspace(0, total - 1, min(total, most, wanted)).astype(np.int32).tolist()


def measure(data: bytes | str, name: str, fps: float, most: int) -> VideoFacts:
    """Decodes a video once, from its first frame to the last that is used.

    Raises:
        BadRow: no frame, a container that is broken or ends early, frames of different sizes.
    """
    with _opened(data, name) as (container, stream):
        seconds = None
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        rate = None if stream.average_rate is None else float(stream.average_rate)
        total = int(stream.frames)
        wanted = sample(total, seconds, fps, most)
        used = set(wanted)
        found: dict[int, int | None] = {}
        sizes: set[tuple[int, int]] = set()
        count = 0
        for index, frame in enumerate(container.decode(stream)):
            count = index + 1
            if index in used:
                found[index] = frame.pts
                sizes.add((frame.width, frame.height))
            if count > wanted[-1]:
                break
    if not found:
        raise BadRow(f"broken video: {name} has no frame")
    if total and count + ABSENT <= wanted[-1]:
        raise BadRow(
            f"broken video: {name} ends after frame {count} of {total}: it is truncated, or damaged"
        )
    if len(sizes) > 1:
        raise BadRow(f"broken video: the frames of {name} have different sizes: {sorted(sizes)}")
    width, height = sizes.pop()
    indices = [i for i in wanted if i in found]
    pts = [found[i] for i in indices]
    known = tuple(p for p in pts if p is not None)
    if len(known) < len(pts) or len(set(known)) < len(set(indices)):
        known = ()
    return VideoFacts(width, height, tuple(indices), known, rate, seconds)


def frames(
    data: bytes | str, name: str, indices: Sequence[int], pts: Sequence[int]
) -> list[Image.Image]:
    """The frames with these numbers; a number may stand twice. Where their times are known,
    decoding begins at the last key frame before the first of them.

    Raises:
        BadRow: it cannot be read, or a frame is missing.
    """
    wanted = list(pts or indices)
    images: dict[int, Image.Image] = {}
    with _opened(data, name) as (container, stream):
        if pts and indices[0] > 0:
            container.seek(min(wanted), stream=stream, backward=True)
        for index, frame in enumerate(container.decode(stream)):
            at = frame.pts if pts else index
            if at in wanted and at not in images:
                images[at] = frame.to_image()
                if len(images) == len(set(wanted)):
                    break
    missing = [i for i, at in zip(indices, wanted, strict=True) if at not in images]
    if missing:
        raise BadRow(f"broken video: {name} has no frame {missing[0]}")
    return [images[at] for at in wanted]
