"""How a data set is named: by an entry of dataset_info.json, or by a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FILE_TYPES = {
    "json": "json",
    "jsonl": "json",
    "csv": "csv",
    "parquet": "parquet",
    "arrow": "arrow",
    "txt": "text",
}


def name_is_path(name: str) -> bool:
    """Whether a data set's name can be no other than a path: it has a slash, or the ending of a
    known file type, or of a YAML file that names data sets.
    """
    return "/" in name or name.rpartition(".")[2].lower() in (*FILE_TYPES, "yaml", "yml")


def short_names(data_sets: Sequence[str]) -> list[str]:
    """Names of data sets for metrics and files: a path's last part without its ending; all of it
    where two would be alike.
    """
    stems = [Path(name).stem if name_is_path(name) else name for name in data_sets]
    return [
        s if stems.count(s) == 1 or s == n else n.replace("/", "_")
        for s, n in zip(stems, data_sets, strict=True)
    ]
