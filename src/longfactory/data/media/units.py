"""Media units: the images and videos of a sample, as the token cache and rows carry them.

A unit holds where its encoded media stand, its size in patches, and the places of its placeholder
tokens. It never holds decoded media: a rank decodes the units that it is dealt (`load`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

MediaKind = Literal["image", "video"]


@dataclasses.dataclass(frozen=True)
class MediaReference:
    """Where encoded media stand: a file, bytes inside a file of the token cache, bytes in memory
    (of a stream), or a list of images (a video that is given as its frames).

    Attributes:
        path: the file that is opened; absolute.
        offset, length: from 0 on: the encoded bytes inside `path`.
        data: the encoded bytes themselves, where there is no file.
        frames: the images of a video given as frames.
        sampled: the frames of a video file that are used, ascending, from 0; the last one twice
            where its family needs an even number.
        pts: their presentation times in the stream's unit; empty where not known.
        size: bytes of the file when it was measured, -1 where not known.
    """

    path: str = ""
    offset: int = -1
    length: int = 0
    data: bytes = dataclasses.field(default=b"", repr=False)
    frames: tuple[MediaReference, ...] = ()
    sampled: tuple[int, ...] = ()
    pts: tuple[int, ...] = ()
    size: int = -1

    def describe(self) -> str:
        """For messages: the file, or what stands in its place."""
        if self.frames:
            return f"a list of {len(self.frames)} frames, the first {self.frames[0].describe()}"
        if self.data or self.offset >= 0:
            return f"an image or video of {len(self.data) or self.length} bytes in the row"
        return self.path


@dataclasses.dataclass(frozen=True)
class MediaUnit:
    """One image or one video of a document (or of a row).

    Attributes:
        kind: image or video.
        reference: where its encoded media stand.
        grid: (t, h, w) in patches before spatial merging, as a processor's image_grid_thw or
            video_grid_thw has it; of families without such a grid (tiles or frames, patches of a
            tile down, patches of a tile across).
        spans: (start, tokens) runs of its placeholder tokens, ascending; from the first token of
            the document, or of the row.
        steps: parts that the tower may run apart, since its attention never crosses them: temporal
            patches of a video, tiles, crops; 1 for a whole.
        even: whether each step makes (tokens - tail) / steps features, in the order of the tokens.
            A unit that is not even is dealt whole.
        tail: tokens after those of the steps, which belong to the last one.
        sizes: further sizes by family: image_sizes (height, width) of llava_onevision,
            (aspect_ratio_id, tiles) of mllama.
        seconds_per_step: seconds between the temporal patches of a video.
        place: the row that it comes from, for messages.
        document: in a row, the number of its document; else -1.
        part: in the token cache, the part of its sample that holds it; else -1.
    """

    kind: MediaKind
    reference: MediaReference
    grid: tuple[int, int, int]
    spans: tuple[tuple[int, int], ...]
    steps: int = 1
    even: bool = True
    tail: int = 0
    sizes: tuple[int, ...] = ()
    seconds_per_step: float | None = None
    place: str = ""
    document: int = -1
    part: int = -1

    @property
    def tokens(self) -> int:
        """Number of placeholder tokens."""
        return sum(count for _, count in self.spans)

    @property
    def patches(self) -> int:
        """Number of patches, before spatial merging."""
        t, h, w = self.grid
        return t * h * w

    @property
    def key(self) -> str:
        """A digest of the media and of their size in patches: equal for two units that show the
        same file in the same way.
        """
        facts = (self.kind, self.reference, self.grid, self.steps, self.sizes)
        return hashlib.sha256(repr(facts).encode() + _bytes(self.reference)).hexdigest()[:32]

    def shifted(self, by: int, document: int = -1) -> MediaUnit:
        """The unit in a row: `by` is the row's position of its document's first token."""
        spans = tuple((start + by, count) for start, count in self.spans)
        return dataclasses.replace(self, spans=spans, document=document)

    def features(self, first: int, last: int) -> tuple[int, int]:
        """The range of the unit's placeholder tokens, counted along its spans, that the steps
        [first, last) fill.
        """
        if not self.even:
            if (first, last) != (0, self.steps):
                raise ValueError(f"Steps [{first}, {last}) of a unit that is dealt whole.")
            return 0, self.tokens
        each = (self.tokens - self.tail) // self.steps
        return first * each, last * each + (self.tail if last == self.steps else 0)


def _bytes(reference: MediaReference) -> bytes:
    return reference.data + b"".join(map(_bytes, reference.frames))


@dataclasses.dataclass(frozen=True)
class Dealt:
    """What one rank loads and runs: the steps [first, last) of `row.media[unit]`."""

    unit: int
    first: int
    last: int


@dataclasses.dataclass
class LoadedMedia:
    """Decoded steps of one unit. `tensors` are what the model's own processor makes of them, on the
    host: `pixel_values`, for images and videos alike, and what else its family needs.
    """

    dealt: Dealt
    tensors: dict[str, Tensor]

    def to(self, device: Any, non_blocking: bool = False) -> LoadedMedia:
        moved = {k: t.to(device, non_blocking=non_blocking) for k, t in self.tensors.items()}
        return LoadedMedia(self.dealt, moved)

    def pin_memory(self) -> LoadedMedia:
        return LoadedMedia(self.dealt, {k: t.pin_memory() for k, t in self.tensors.items()})


# -- as the token cache writes them ----------------------------------------------------------------


def to_json(unit: MediaUnit) -> dict[str, Any]:
    """The unit as an object of JSON; what has its default is left out. Bytes in memory cannot be
    written.
    """
    found = {}
    for field in dataclasses.fields(unit):
        value = getattr(unit, field.name)
        if field.name == "reference":
            found["reference"] = _reference_to_json(value)
        elif value != field.default:
            found[field.name] = value
    return found


def from_json(found: dict[str, Any], folder: Path | None = None) -> MediaUnit:
    """The unit that `to_json` wrote. `folder` holds the file of encoded bytes of its store."""
    values = dict(found)
    values["reference"] = _reference_from_json(values["reference"], folder)
    values["grid"] = tuple(values["grid"])
    values["spans"] = tuple((start, count) for start, count in values["spans"])
    values["sizes"] = tuple(values.get("sizes", ()))
    return MediaUnit(**values)


BYTES_FILE = "media.bin"
"""Encoded images and videos that stand in rows, one after the other."""


def _reference_to_json(reference: MediaReference) -> dict[str, Any]:
    if reference.data:
        raise ValueError("Bytes in memory have no place in the token cache.")
    found: dict[str, Any] = {
        field.name: getattr(reference, field.name)
        for field in dataclasses.fields(reference)
        if field.name not in ("data", "frames") and getattr(reference, field.name) != field.default
    }
    if reference.frames:
        found["frames"] = [_reference_to_json(frame) for frame in reference.frames]
    return found


def _reference_from_json(found: dict[str, Any], folder: Path | None) -> MediaReference:
    values = dict(found)
    values["frames"] = tuple(_reference_from_json(f, folder) for f in values.get("frames", ()))
    values["sampled"] = tuple(values.get("sampled", ()))
    values["pts"] = tuple(values.get("pts", ()))
    if values.get("offset", -1) >= 0 and folder is not None:
        values["path"] = str(folder / BYTES_FILE)
    return MediaReference(**values)
