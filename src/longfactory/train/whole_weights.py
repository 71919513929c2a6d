"""Weights of a checkpoint whose names in the file are not those in the model.

transformers stores the experts of a layer one by one and holds them as one tensor. Its Trainer reads a checkpoint by plain names: such
weights stayed as they were, with a warning. `from_pretrained` knows both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longfactory.errors import UserError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_renamed(model: Any, folder: str | Path) -> list[str]:
    """Reads what the checkpoint holds under other names than the model, and returns the model's names of that.

    Args:
        model: a whole transformers model, not wrapped. Weights that the file holds under their own names are left alone.
        folder: with safetensors of a whole model; without them nothing is done.
    Raises:
        UserError: a weight of the model is not in the checkpoint.
    """
    stored = _names(Path(folder))
    if stored is None:
        return []
    state = model.state_dict()
    there = {t.data_ptr() for name, t in state.items() if name in stored}  # tied weights are stored once
    missing = [name for name, t in state.items() if name not in stored and t.data_ptr() not in there]
    if not missing:
        return []
    whole, found = type(model).from_pretrained(folder, config=model.config, dtype="auto", output_loading_info=True)
    absent = sorted({*missing} & {*found["missing_keys"]} | {*missing} - {*whole.state_dict()})
    if absent:
        raise UserError(f"The checkpoint {folder} does not hold {', '.join(absent[:3])}: it is of another model. Start anew.")
    theirs = whole.state_dict()
    with torch.no_grad():
        for name in missing:
            state[name].copy_(theirs[name])
    return missing


def _names(folder: Path) -> set[str] | None:
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    if not (folder / FILE).is_file():
        return None
    with safe_open(folder / FILE, "pt") as f:
        return set(f.keys())
