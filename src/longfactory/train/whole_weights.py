"""Weights of a checkpoint whose names in the file are not those in the model.

transformers stores the experts of a layer one by one and holds them as one tensor. Its Trainer
reads a checkpoint by plain names: such weights stayed as they were, with a warning.
`from_pretrained` knows both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longfactory.errors import UserError
from longfactory.model.source import FILE, INDEX, stored_tensors


def load_renamed(model: Any, folder: str | Path) -> list[str]:
    """Reads what the checkpoint holds under other names than the model, and returns the model's
    names of that.

    Args:
        model: a whole transformers model, not wrapped. Weights that the file holds under their own
            names are left alone.
        folder: with safetensors of a whole model; without them nothing is done.
    Raises:
        UserError: a weight of the model is not in the checkpoint.
    """
    if not any((Path(folder) / name).is_file() for name in (FILE, INDEX)):
        return []
    stored = stored_tensors(folder)
    state = model.state_dict()
    # tied weights are stored once
    there = {t.data_ptr() for name, t in state.items() if name in stored}
    missing = [
        name for name, t in state.items() if name not in stored and t.data_ptr() not in there
    ]
    if not missing:
        return []
    whole, found = type(model).from_pretrained(
        folder, config=model.config, dtype="auto", output_loading_info=True
    )
    absent = sorted({*missing} & {*found["missing_keys"]} | {*missing} - {*whole.state_dict()})
    if absent:
        raise UserError(
            f"The checkpoint {folder} does not hold {', '.join(absent[:3])}: it belongs to "
            "another model. Start over."
        )
    theirs = whole.state_dict()
    with torch.no_grad():
        for name in missing:
            state[name].copy_(theirs[name])
    return missing
