"""Images as LLaMA-Factory reads them: opened, checked whole, and brought into the range of pixels
that the run allows.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import get_worker_info

from longfactory.data.errors import BadRow

# Of images half as large as those that it refuses. For good: threads decode side by side.
warnings.filterwarnings("ignore", module=r"PIL\.")

Item = TypeVar("Item")
Made = TypeVar("Made")
Size = tuple[int, int]  # width, height
SMALLEST_SIDE = 28
"""Of an image for Qwen's towers and their kin: LLaMA-Factory enlarges narrower ones."""
LONGEST_RATIO, KEPT_RATIO = 200, 180
"""Of their sides: what is longer than the one is squeezed to the other."""


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Around what Pillow does with bytes of a stranger.

    Raises:
        BadRow: they are no image that can be decoded.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise BadRow(f"broken image: {name} is not in a format that can be read") from None
    except Image.DecompressionBombError as error:
        raise BadRow(f"too large an image: {name}: {error}") from None
    except MemoryError:
        raise BadRow(f"too large an image: {name} does not fit into memory") from None
    # what decoders make of damaged bytes; what a file system says
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise BadRow(f"broken image: {name} cannot be decoded: {reason}") from None


def check(data: bytes, name: str) -> tuple[Size, int]:
    """(width and height, number of frames) of an encoded image, all of whose bytes are decoded
    once.

    Raises:
        BadRow: it is no image, or cannot be decoded to its end.
    """
    with _readable(name), Image.open(io.BytesIO(data)) as image:
        size, frames = image.size, 1
        if getattr(image, "is_animated", False) and image.format != "MPO":
            frames = int(getattr(image, "n_frames", 1))
        if min(size) < 1:
            raise ValueError(f"its size is {size[0]} x {size[1]}")
        if image.format == "JPEG":
            image.draft(image.mode, (max(size[0] // 8, 1), max(size[1] // 8, 1)))
        image.load()
        _eight_bits(image, name)
        return size, frames


def decode(data: bytes, name: str) -> Image.Image:
    """The image, whole in memory, with 8 bits a channel; of an animated one its first frame.

    Raises:
        BadRow: as `check`.
    """
    with _readable(name):
        image = Image.open(io.BytesIO(data))
        image.load()
        return _eight_bits(image, name)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The image with 8 bits a channel. Of 16 bits the upper 8 stay (Pillow's own conversion makes
    all brighter values white).
    """
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if values.dtype.kind == "f":
        raise BadRow(f"broken image: {name} holds floating-point values, whose range is not known")
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BadRow(f"broken image: {name} holds values of more than 16 bits")
    if values.size and values.max() > 255:
        values = values >> 8
    return Image.fromarray(values.astype(np.uint8))


def in_threads(function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """`function` of each item, in their order, by as many threads as this process has cores for
    itself (8 at most): decoding and arithmetic on pixels leave Python's lock.
    """
    loader = get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    processes *= 1 if loader is None else loader.num_workers
    threads = min(8, len(items), len(os.sched_getaffinity(0)) // processes)
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def encoded(image: Image.Image) -> bytes:
    """A decoded image as PNG, without loss of what is trained on (`convert("RGB")` later)."""
    known = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
    kept = image if image.mode in known else image.convert("RGB")
    out = io.BytesIO()
    kept.save(out, "PNG", compress_level=1)
    return out.getvalue()


def steps_to_size(size: Size, most: int, least: int, qwen: bool) -> list[Size]:
    """The sizes through which LLaMA-Factory resizes an image of `size`, the last of them the one
    that the model's processor sees; empty where it stays.

    Args:
        size: width, height.
        most, least: pixels (width x height) that an image may have.
        qwen: whether narrow and very long images are widened, for Qwen's towers and their kin.
    Raises:
        BadRow: nothing is left of the image.
    """
    width, height = size
    out: list[Size] = []

    def to(width: int, height: int) -> None:
        if min(width, height) < 1:
            raise BadRow(
                f"broken image: {size[0]} x {size[1]} pixels become {width} x {height} in the"
                " range of pixels that the run allows"
            )
        out.append((width, height))

    if width * height > most:
        factor = math.sqrt(most / (width * height))
        width, height = int(width * factor), int(height * factor)
        to(width, height)
    if width * height < least:
        factor = math.sqrt(least / (width * height))
        width, height = int(width * factor), int(height * factor)
        to(width, height)
    if not qwen:
        return out
    if min(width, height) < SMALLEST_SIDE:
        width, height = max(width, SMALLEST_SIDE), max(height, SMALLEST_SIDE)
        to(width, height)
    if width / height > LONGEST_RATIO:
        width = height * KEPT_RATIO
        to(width, height)
    if height / width > LONGEST_RATIO:
        height = width * KEPT_RATIO
        to(width, height)
    return out


def resized(image: Image.Image, sizes: Sequence[Size]) -> Image.Image:
    """The image in RGB, resized through `sizes`, in LLaMA-Factory's order."""
    for size in sizes:
        image = image.resize(size)
    return image if image.mode == "RGB" else image.convert("RGB")
