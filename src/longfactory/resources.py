"""Files that come with the package: examples, DeepSpeed's configurations, the demo data. In a wheel
they lie in the package (`setup.py` copies them), in a clone beside `src`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

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


def copy_all(target: Path) -> list[Path]:
    """Copies the examples and the demo data into a folder. Files that are there stay as they are.

    Returns:
        The files that were written.
    """
    written = []
    for name in FOLDERS:
        source = folder(name)
        for path in sorted(source.rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            copy = target / name / path.relative_to(source)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                written.append(copy)
    return written
