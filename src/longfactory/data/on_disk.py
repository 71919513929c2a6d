"""Folders that the package datasets wrote (`save_to_disk`)."""

from __future__ import annotations

import json
from pathlib import Path

from longfactory.errors import DataError

SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def saved_files(folder: Path, split: str, name: str) -> list[Path] | None:
    """The files of rows that a folder of `save_to_disk` names, in its order; None for another
    folder.

    Args:
        split: which one, of a folder with several.
        name: of the data set, for what is said.
    Raises:
        DataError: it has no such split, or its own files are damaged.
    """
    listed = folder / SPLITS
    try:
        if listed.is_file():
            splits = json.loads(listed.read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise DataError(
                    f"Data set {name!r}: {folder} has no split {split!r}. Set split to one of"
                    f" {', '.join(splits)}."
                )
            folder, listed = folder / split, folder / split / STATE
        else:
            listed = folder / STATE
            # a file of rows may have that name; save_to_disk writes both
            if not (listed.is_file() and (folder / INFO).is_file()):
                return None
        state = json.loads(listed.read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"Data set {name!r}: {listed} is not what datasets' save_to_disk writes. Save the data"
            " again."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if not files:
        raise DataError(f"Data set {name!r}: {folder} holds no rows.")
    if missing:
        raise DataError(
            f"Data set {name!r}: {folder} lacks {', '.join(missing[:3])}. Copy or save the data"
            " again."
        )
    return files
