"""The folders that the page may read and write: chosen when the server starts, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from longfactory.errors import UserError

SKIPPED = ("node_modules", "__pycache__", "site-packages", "longfactory_webui")
"""Folders in which nobody looks for runs or files of runs."""
DEEPEST = 5
"""Folders below a chosen one that are looked through."""
MOST_FOLDERS = 5_000
"""Folders that one look goes through; the page says so where there are more."""


class OutsideError(UserError):
    """A path that lies in none of the chosen folders."""


class Folders:
    """The chosen folders, with symbolic links resolved.

    Args:
        paths: folders that exist; the first one also holds what the page writes of its own.
    Raises:
        UserError: one of them does not exist.
    """

    def __init__(self, paths: Sequence[str | Path]):
        found = []
        for path in paths:
            folder = Path(path).expanduser()
            if not folder.is_dir():
                raise UserError(f"--folder {path}: there is no such folder.")
            found.append(folder.resolve())
        if not found:
            raise UserError("--folder: got none, expected at least one.")
        self.roots: tuple[Path, ...] = tuple(dict.fromkeys(found))

    def holds(self, path: str | Path) -> bool:
        """Whether a path, with its symbolic links resolved, lies in a chosen folder."""
        try:
            real = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, no home, a null character
            return False
        return any(real == root or root in real.parents for root in self.roots)

    def inside(self, path: str | Path, what: str = "") -> Path:
        """The resolved path.

        Args:
            what: the key, for the message.
        Raises:
            OutsideError: it lies in none of the chosen folders.
        """
        if not self.holds(path):
            key = f"{what}: " if what else ""
            raise OutsideError(
                f"{key}{path} lies outside of the folders that this page may use"
                f" ({', '.join(map(str, self.roots))}). Start the page with --folder, once for"
                " each folder that it may read and write."
            )
        return Path(path).expanduser().resolve()

    def walk(self) -> Iterator[tuple[Path, list[str]]]:
        """(folder, names of its files) of each folder, its chosen root first; symbolic links to
        folders are not followed. At most `MOST_FOLDERS`.
        """
        seen: set[Path] = set()
        for root in self.roots:
            for place, folders, files in os.walk(root):
                here = Path(place)
                if here in seen or len(seen) >= MOST_FOLDERS:
                    folders.clear()
                    continue
                seen.add(here)
                deep = len(here.relative_to(root).parts) >= DEEPEST
                folders[:] = [] if deep else sorted(filter(_looked_into, folders))
                yield here, sorted(files)


def _looked_into(name: str) -> bool:
    return not name.startswith((".", "checkpoint-")) and name not in SKIPPED
