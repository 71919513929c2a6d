"""Checkpoints in the chosen folders, and the keys by which chat and export read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from longfactory.config.folder import RUN_FILE, WEIGHTS, checkpoints
from longfactory.webui.folders import Folders

ADAPTER = "adapter_config.json"
KEPT = ("template", "default_system", "enable_thinking", "trust_remote_code")
"""Keys of the run that chat and export read as well."""


def found_models(folders: Folders) -> list[dict[str, str]]:
    """Folders with weights: what a run has saved at its end, then its checkpoints, the last one
    first.
    """
    found = []
    for folder, files in folders.walk():
        root = next(r for r in folders.roots if r == folder or r in folder.parents)
        places = [(folder, files)]
        places += [(p, [q.name for q in _inside(p)]) for p in checkpoints(folder)]
        for place, names in places:
            if any(name in names for name in WEIGHTS) and folders.holds(place):
                kind = "adapter" if ADAPTER in names else "model"
                name = str(place.relative_to(root))
                found.append({"folder": str(place), "name": name, "kind": kind})
    return found


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def run_of_model(folder: Path) -> str:
    """YAML for `longfactory chat` and `export` of a folder with weights.

    What is not known is left out: the command's reader asks for it.
    """
    values: dict[str, Any] = {}
    trained: Any = _read(folder / RUN_FILE) or _read(folder.parent / RUN_FILE) or {}
    adapter = _read(folder / ADAPTER)
    if adapter:
        base = adapter.get("base_model_name_or_path") or trained.get("model_name_or_path")
        named = trained.get("model_name_or_path") or base
        values = {"model_name_or_path": named, "adapter_name_or_path": str(folder)}
    else:
        values = {"model_name_or_path": str(folder)}
    values |= {name: trained[name] for name in KEPT if trained.get(name)}
    values |= {"max_new_tokens": 256, "export_dir": f"{folder}_exported"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    """A mapping in a YAML or JSON file; empty where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
