"""Files that come with the package: examples, DeepSpeed's configurations, the demo data. In a wheel
they lie in the package (`setup.py` copies them), in a clone beside `src`.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longfactory.errors import UserError

FOLDERS = ("examples", "data")
_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """One of `FOLDERS`.

    Raises:
        UserError: the installation lacks it.
    """
    for place in (_PACKAGE / "share" / name, _PACKAGE.parents[1] / name):
        if place.is_dir():
            return place
    raise UserError(
        f"This installation of LongFactory has no folder {name}. Install the package again."
    )


def copies(target: Path) -> Iterator[tuple[Path, Path]]:
    """Each file of the examples and the demo data, and its place below a folder."""
    for name in FOLDERS:
        source = folder(name)
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path, target / name / path.relative_to(source)


def copy_all(target: Path) -> tuple[list[Path], list[Path]]:
    """Copies the examples and the demo data into a folder. Files that are there stay as they are.

    Returns:
        The files that were written, and those that are there with another content.
    """
    written, others = [], []
    for path, copy in copies(target):
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            written.append(copy)
        elif not filecmp.cmp(path, copy, shallow=False):
            others.append(copy)
    return written, others


def data_sets() -> dict[str, Any]:
    """The demo data's entries of dataset_info.json."""
    return json.loads((folder("data") / "dataset_info.json").read_text(encoding="utf-8"))
