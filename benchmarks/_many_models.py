"""Models and data of the runs of `many_gpus.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _many_table import Row
from make_model import SHAPES, make_model
from plan_accuracy import FURTHER


def model_folder(a: argparse.Namespace, folder: Path, shape: str, layers: int | None) -> Path:
    """A model folder without weights; with --smoke a tiny one. Its tokenizer makes a token of each
    byte, which takes no time.
    """
    name = "tiny" if a.smoke else shape
    make_model(name if name in SHAPES else "qwen2.5-7b", folder, vocabulary=BYTES)
    config = dict(SHAPES.get(name) or FURTHER[name])
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


BYTES = 259
"""Entries of a tokenizer of bytes: theirs and three marks."""


def on_gpus(a: argparse.Namespace, n: int) -> Row:
    """Keys of a run over `n` GPUs; on CPUs other ones."""
    if a.smoke:
        return {"bf16": "false"}
    return {"sharding": "fsdp2"} if n > 1 else {}
