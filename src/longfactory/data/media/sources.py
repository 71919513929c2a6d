"""Media as rows name them: a path, encoded bytes, an image in memory, a list of frames, a URL."""

from __future__ import annotations

import base64
import binascii
import os
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from PIL import Image

from longfactory.data.errors import BadRow
from longfactory.data.media.images import encoded
from longfactory.data.media.process import OUTSIDE, URL, Processing
from longfactory.data.media.units import MediaReference

LARGEST_DOWNLOAD = 1 << 30
SECONDS = 60.0
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def reference_of(value: Any, processing: Processing) -> MediaReference:
    """Where a row's image or video stands. Bytes come along in memory.

    Raises:
        BadRow: there is nothing at that place, it may not be read, or the value is of a kind that
            is not known.
    """
    if isinstance(value, dict):
        found = next((value[k] for k in ("bytes", "path", "url") if value.get(k) is not None), None)
        if found is None:
            raise BadRow(f"missing media: an object with {sorted(value)}, expected bytes or path")
        return reference_of(found, processing)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _of_text(value, processing)
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not len(value):
            raise BadRow("empty media: the row holds 0 bytes")
        return MediaReference(data=bytes(value))
    if isinstance(value, Image.Image):
        return MediaReference(data=encoded(value))
    if isinstance(value, Sequence):
        if not value:
            raise BadRow("broken video: a list of no frames")
        return MediaReference(frames=tuple(reference_of(frame, processing) for frame in value))
    raise BadRow(f"unknown media: a {type(value).__name__}, expected a path, bytes or frames")


def _of_text(text: str, processing: Processing) -> MediaReference:
    if not text.strip():
        raise BadRow("missing media: the path is empty")
    if text.startswith("data:"):
        return MediaReference(data=_inline(text))
    scheme = _SCHEME.match(text)
    if scheme and scheme.group(1).lower() == "file":
        return _of_path(unquote(urlparse(text).path), processing)
    if scheme:
        return MediaReference(data=_fetched(text, scheme.group(1).lower(), processing))
    return _of_path(text, processing)


def _inline(text: str) -> bytes:
    head, _, body = text.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadRow(f"broken media: a data: URL cannot be read: {error}") from None


def _of_path(path: str, processing: Processing) -> MediaReference:
    if "\0" in path:
        raise BadRow("missing media: the path holds a null character")
    folder = os.path.realpath(processing.media_dir)
    full = os.path.join(folder, path)
    try:
        real = os.path.realpath(full, strict=True)
        size = os.stat(real).st_size
    except OSError as error:
        # LLaMA-Factory would take it from there
        elsewhere = "; the working folder has it: set media_dir: ." if os.path.exists(path) else ""
        raise BadRow(
            f"missing media: {path} cannot be opened in media_dir ({processing.media_dir}):"
            f" {error.strerror or error}{elsewhere}"
        ) from None
    if OUTSIDE not in processing.allow and not Path(real).is_relative_to(folder):
        link = "" if os.path.normpath(full) == real else f", which leads to {real}"
        raise BadRow(
            f"media outside media_dir: {path}{link} is not inside {processing.media_dir}; set"
            " media_dir to the folder that holds it, or media_allow: outside"
        )
    if not os.path.isfile(real):
        raise BadRow(f"missing media: {path} is not a file")
    if size == 0:
        raise BadRow(f"empty media: {path} has 0 bytes")
    return MediaReference(path=os.path.normpath(full), size=size)


def _fetched(url: str, scheme: str, processing: Processing) -> bytes:
    shown = url if len(url) <= 100 else f"{url[:100]}..."
    if URL not in processing.allow:
        raise BadRow(
            f"URL: {shown} is not fetched; download it and give its path, or set media_allow: url"
        )
    if scheme not in ("http", "https"):
        raise BadRow(f"URL: {shown} is of a kind that is not fetched ({scheme}); expected https")
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            data = answer.read(LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError) as error:
        raise BadRow(f"URL: {shown} could not be fetched: {error}") from None
    if not data or len(data) > LARGEST_DOWNLOAD:
        raise BadRow(f"URL: {shown} holds {len(data)} bytes, expected 1 to {LARGEST_DOWNLOAD}")
    return bytes(data)


def read(reference: MediaReference) -> bytes:
    """The encoded bytes of an image.

    Raises:
        OSError: the file cannot be read.
        BadRow: it has another size than when it was measured.
    """
    if reference.data:
        return reference.data
    if reference.offset >= 0:
        with open(reference.path, "rb") as file:
            file.seek(reference.offset)
            data = file.read(reference.length)
        expected = reference.length
    else:
        data = Path(reference.path).read_bytes()
        expected = reference.size
    if expected >= 0 and len(data) != expected:
        raise BadRow(
            f"changed media: {reference.path} has {len(data)} bytes, and had {expected} when it was"
            " tokenised"
        )
    return data
