"""Files of weights that are not whole: told by their first bytes and their size, before they are
read and before the data are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

POINTER = b"version https://git-lfs"
"""How the text begins that stands for a file in a clone made without git-lfs."""
MODEL = ("model.safetensors", "pytorch_model.bin")
INDICES = tuple(f"{name}.index.json" for name in MODEL)
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors reads no longer one. A damaged file's first bytes may say any length."""
ZIP, BEFORE_1_6 = b"PK", b"\x80"
"""The first bytes of what torch saves: of an archive, and of a pickle."""


def found(folder: Path, names: Sequence[str] = MODEL) -> str | None:
    """What is wrong with the files of weights that would be read, or None. Of what they hold,
    nothing is read.

    Args:
        folder: of a model or an adapter.
        names: of a file, in transformers' order of preference; each may have an index in its place.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return of_file(folder / name)
        if index.is_file():
            return _of_index(index)
    if _names_its_file(folder / "config.json"):
        return None
    parts = sorted(p.name for p in folder.glob("*-of-*") if p.suffix in (".safetensors", ".bin"))
    if parts:
        return (
            f"{folder} holds parts ({parts[0]}) and lacks the index of them, such as"
            f" {names[0]}.index.json. Copy or download that, too."
        )
    return f"{folder} holds no weights ({', '.join(names)}, or their index)."


def _names_its_file(config: Path) -> bool:
    """Whether a configuration says which file holds the weights, whatever its name."""
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("transformers_weights"))
    except (OSError, ValueError, AttributeError):
        return False


def _of_index(index: Path) -> str | None:
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return of_file(index) or f"{index} is no index of weights."
    folder = index.parent
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return (
            f"{folder} lacks {', '.join(missing[:3])}{more}, which {index.name} names. Copy or"
            " download them again."
        )
    for part in parts:
        if (wrong := of_file(folder / part)) is not None:
            return wrong
    return None


def of_file(file: Path) -> str | None:
    """What is wrong with a file, or None."""
    try:
        return _in_file(file)
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}."


def _in_file(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
        if start == POINTER:
            return (
                f"{file} is not the file itself but Git LFS's pointer to it. Run `git lfs pull`"
                " there, or download the model with `hf download`."
            )
        if file.suffix == ".bin":
            whole = start.startswith((ZIP, BEFORE_1_6))
            return None if whole else f"{file} ({size:,} bytes) is no file that torch saved."
        if file.suffix != ".safetensors":
            return None
        opened.seek(0)
        length = int.from_bytes(opened.read(8), "little")
        try:
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"{file} ({size:,} bytes) is cut short or no safetensors file. Copy it again."
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        return f"{file} is cut short: {size:,} of {needed:,} bytes. Copy or download it again."
    return None
