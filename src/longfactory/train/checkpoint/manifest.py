"""The manifest of a checkpoint: of which run and step it is, its files with sizes and checksums.

It is written last, when every other file is on the disk, and holds a checksum of itself. Checksums
are xxh3 of 128 bits, which one core computes faster than disks read. They find damage, and are no
protection from somebody who wants to deceive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from longfactory.config.folder import MANIFEST, write_whole

FORMAT = 1
_BLOCK = 1 << 22

Files = dict[str, dict[str, Any]]
"""Path in the checkpoint, with / -> {"size": bytes, "xxh3": 32 hexadecimal digits}."""


def list_files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder by their path in it, without the manifest."""
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST
    }


def share(sizes: Mapping[str, int], parts: int, part: int) -> list[str]:
    """The files that one of `parts` processes reads: all have about as many bytes to read."""
    loads = [0] * parts
    mine = []
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        to = loads.index(min(loads))
        loads[to] += sizes[name]
        if to == part:
            mine.append(name)
    return mine


def measure(folder: Path, names: Iterable[str], *, sync: bool = False) -> Files:
    """Sizes and checksums of some files. `sync`: what was written is put on the disk first."""
    return {name: _measure(folder / name, sync) for name in names}


def _measure(path: Path, sync: bool) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        while block := f.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "xxh3": digest.hexdigest()}


def write(folder: Path, facts: dict[str, Any], files: Files) -> None:
    """Writes the manifest, and puts it and the folders on the disk.

    Args:
        facts: run, step and whatever else tells what the checkpoint is of, as JSON can hold it.
    """
    manifest = {"format": FORMAT, **facts, "files": dict(sorted(files.items()))}
    text = {"xxh3": _checksum_of(manifest), "manifest": manifest}
    write_whole(folder / MANIFEST, json.dumps(text, indent=1) + "\n")
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it for folders
    finally:
        os.close(descriptor)


def read(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest of a checkpoint, and what is wrong with it. (None, None): there is none."""
    try:
        text = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest, checksum = text["manifest"], text["xxh3"]
        if checksum != _checksum_of(manifest):
            return (
                None,
                f"{MANIFEST}: its checksum is {_checksum_of(manifest)}, expected {checksum}",
            )
        if manifest["format"] != FORMAT:
            return None, (
                f"{MANIFEST} has format {manifest['format']}, this LongFactory reads {FORMAT}:"
                " it was written by another version"
            )
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{MANIFEST} cannot be read ({type(error).__name__})"
    return manifest, None


def _checksum_of(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def problems_of(folder: Path, files: Files, names: Iterable[str]) -> list[str]:
    """Reads some of a checkpoint's files whole. What differs from the manifest, a sentence each."""
    found = []
    for name in names:
        expected = files[name]
        try:
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                found.append(f"{name} has {size} bytes, expected {expected['size']}")
                continue
            checksum = _measure(folder / name, sync=False)["xxh3"]
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror or error}")
        else:
            if checksum != expected["xxh3"]:
                found.append(f"{name} has the checksum {checksum}, expected {expected['xxh3']}")
    return found
