"""Keys of short runs of a tiny model from scratch on the quickstart's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
from make_model import make_model  # noqa: E402


def manual_run(folder: Path, **keys: Any) -> dict[str, Any]:
    """`keys` on top of what such runs have alike. `cache` is a folder for the environment, no key
    of a configuration.
    """
    return {
        "cache": str(folder / "cache"),
        "model_name_or_path": str(make_model("tiny", folder / "model", vocabulary=600)),
        "train_from_scratch": True,
        "template": "chatml",
        "dataset_dir": str(ROOT / "data"),
        "cutoff_len": 300,
        "finetuning_type": "full",
        **keys,
    }


def manual_sft(folder: Path) -> dict[str, Any]:
    """Keys of a run over two processes, two conversations in a row."""
    return manual_run(
        folder,
        max_samples=12,
        stage="sft",
        dataset="manual_sft",
        per_device_train_batch_size=2,
        sequence_parallel_size=2,
        output_dir=str(folder / "out"),
    )
