"""Variables of LLaMA-Factory's environment that change what it reads, and are not read here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from longfactory.config.fields import shown

MARKS = {
    "IMAGE_PLACEHOLDER": "<image>",
    "VIDEO_PLACEHOLDER": "<video>",
    "AUDIO_PLACEHOLDER": "<audio>",
}
HUBS = {"USE_MODELSCOPE_HUB": "ModelScope", "USE_OPENMIND_HUB": "openMind"}


def problems(environment: Mapping[str, str]) -> Iterator[str]:
    """A mark of images that is another one in the data would be trained as text."""
    for name, mark in MARKS.items():
        if environment.get(name, mark) != mark:
            yield (
                f"The environment sets {name} to {shown(environment[name])}; LongFactory's "
                f"placeholder is always {mark}. Write {mark} in the data, and unset {name}."
            )


def notes(environment: Mapping[str, str], model: str | None) -> Iterator[str]:
    """Where a model is looked for that is no folder."""
    if model is None or Path(model).expanduser().exists():
        return
    for name, hub in HUBS.items():
        if environment.get(name, "0").lower() in ("1", "true", "y"):
            yield (
                f"{name} is not read: {shown(model)} is looked up on the Hugging Face hub. To train"
                f" {hub}'s files, download them and give their folder."
            )
