"""The processing of a run's media: the model's own image processor, its family, the run's keys.

The processor is the one in the model's folder, on transformers' PIL back end: it needs no
torchvision, and the same pixels come out on every machine. Frames of videos go through the same
arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from longfactory.config.data_arguments import DataSettings, option
from longfactory.data.media.families import FAMILIES, OF_MODEL, OF_TEMPLATE
from longfactory.data.media.family import Facts, Family, MediaKeys
from longfactory.data.template_table import TABLE
from longfactory.errors import DataError

log = logging.getLogger("longfactory")

URL = "url"
OUTSIDE = "outside"
_TOKENS = (
    *("image_token", "video_token", "boi_token", "eoi_token"),
    *("start_image_token", "end_image_token", "context_image_token"),
)
_CONFIG = ("model_type", "mm_tokens_per_image", "image_seq_length")
_VIDEO_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")


@dataclasses.dataclass
class Processing:
    """What turns images and videos into tokens and tensors. Picklable.

    Attributes:
        family: see `families`.
        media_dir: the folder that paths are seen from, and must not leave.
        allow: what may be read beside it: OUTSIDE, URL.
        image_token_id, video_token_id: ids of the placeholder tokens.
    """

    family: Family
    media_dir: str
    allow: frozenset[str]
    image_token_id: int
    video_token_id: int

    @property
    def keys(self) -> MediaKeys:
        return self.family.keys

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return tuple({self.image_token_id, self.video_token_id})

    @property
    def placeholder_texts(self) -> tuple[str, ...]:
        return tuple({self.family.image_token, self.family.video_token})

    def facts(self) -> dict[str, Any]:
        """What tokens depend on, for the key of a token cache."""
        settings = self.family.processor.to_dict()
        return {
            "family": self.family.name,
            "keys": dataclasses.asdict(self.keys),
            "processor": json.loads(json.dumps(settings, default=str)),
            "facts": dataclasses.asdict(self.family.facts),
            "media_dir": os.path.realpath(self.media_dir),
            "allow": sorted(self.allow),
        }


@dataclasses.dataclass(frozen=True)
class Unusable:
    """In the place of a `Processing`: the model has images, and they cannot be processed as the run
    stands. Data without images or videos are trained on; the first row with one ends the run.

    Attributes:
        reason: what to put right.
    """

    reason: str


def make_processing(
    folder: str, config: dict[str, Any], args: DataSettings, tokenizer: Any
) -> Processing | Unusable | None:
    """The processing of a model's media; None for a model that takes text alone, and, said in the
    log, for a family that is not known and a folder without a processor, which train on text: their
    rows with media are bad rows. `Unusable`, said in the log, where a processor cannot be read or
    belongs to another model, where the template is another family's, or the tokenizer has no
    placeholder tokens.

    Args:
        folder: the model's, or its name on the hub.
        config: its config.json.
        args: the run's data keys.
        tokenizer: its tokenizer.
    """
    if not config.get("vision_config"):
        return None
    files = ("preprocessor_config.json", "processor_config.json")
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in files):
        log.warning(
            f"{folder} has neither {files[0]} nor {files[1]}: the model is trained on text alone,"
            " and a row with images or videos counts as a bad row."
        )
        return None
    model_type = str(config.get("model_type"))
    name = OF_MODEL.get(model_type)
    if name is None:
        log.warning(
            f"Images of models of type {model_type} are not read here, those of"
            f" {', '.join(sorted(OF_MODEL))} are: the model is trained on text alone, and a row"
            " with images or videos counts as a bad row."
        )
        return None
    try:
        return _processing(folder, name, config, args, tokenizer)
    except DataError as error:
        log.warning(
            f"{error} Until then the model takes text alone, and a row with images or videos ends"
            " the run."
        )
        return Unusable(str(error))


def _processing(
    folder: str, name: str, config: dict[str, Any], args: DataSettings, tokenizer: Any
) -> Processing:
    """Of a model of the family `name`.

    Raises:
        DataError: what `Unusable` stands for.
    """
    _check_template(args.template, name, str(config.get("model_type")))
    if getattr(tokenizer, "split_special_tokens", False):
        raise DataError(
            "split_special_tokens: true would cut the placeholder tokens of images into pieces. Set"
            " it to false for a model that takes images."
        )
    processor = load_image_processor(folder)
    facts = Facts(
        processor=_processor_facts(folder),
        video=_video_settings(folder),
        config={k: config.get(k) for k in _CONFIG} | {"vision_config": _patches(config)},
        tokens={
            role: str(token)
            for role in _TOKENS
            if isinstance(token := getattr(tokenizer, role, None), str)
        },
    )
    family = FAMILIES[name](processor, facts, media_keys(args))
    family.check(config)
    image = _token_id(tokenizer, family.image_token)
    video = _token_id(tokenizer, family.video_token) if family.videos else image
    return Processing(family, media_dir(args), frozenset(option(args, "media_allow")), image, video)


def media_keys(args: DataSettings) -> MediaKeys:
    """The keys of images and videos among the run's."""
    return MediaKeys(**{f.name: option(args, f.name) for f in dataclasses.fields(MediaKeys)})


def media_dir(args: DataSettings) -> str:
    """The folder that paths of media are seen from: `media_dir`, else that of the data sets."""
    found = option(args, "media_dir")
    if found:
        return str(found)
    where = args.dataset_dir
    return where if isinstance(where, str) and Path(where).is_dir() else "."


def _patches(config: dict[str, Any]) -> dict[str, Any]:
    return {"patch_size": config["vision_config"].get("patch_size", 14)}


def _check_template(template: str | None, family: str, model_type: str) -> None:
    if template is None or OF_TEMPLATE.get(template) == family or template not in TABLE:
        return
    right = sorted(t for t, f in OF_TEMPLATE.items() if f == family)
    known = f" Its templates are {', '.join(right)}." if right else ""
    if template in OF_TEMPLATE:
        raise DataError(
            f"Template {template!r} writes images for models of the family"
            f" {OF_TEMPLATE[template]}; the model is a {model_type}.{known}"
        )


def load_image_processor(folder: str) -> Any:
    """The image processor in a model's folder, PIL back end.

    Raises:
        DataError: it is missing, or cannot be read.
    """
    # Not `from transformers`: up to 5.17 that name asks for torchvision, which is not needed here.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"The image processor of {folder} cannot be read ({reason}). The model's folder needs"
            " preprocessor_config.json or processor_config.json: copy it from the model that it"
            " was made of."
        ) from error


def _read(folder: str, name: str) -> dict[str, Any]:
    """A JSON file of a model; empty where it has none."""
    from transformers.utils import cached_file

    path = cached_file(
        folder,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name} of {folder} cannot be read: {error}.") from error
    return found if isinstance(found, dict) else {}


def _processor_facts(folder: str) -> dict[str, Any]:
    found = _read(folder, "processor_config.json")
    return {k: v for k, v in found.items() if not isinstance(v, dict)}


def _video_settings(folder: str) -> dict[str, Any]:
    """Settings of the video processor: of its own file, else nested in processor_config.json, else
    those that it shares with images.
    """
    nested = _read(folder, "processor_config.json").get("video_processor")
    if isinstance(nested, dict):
        return nested
    return next((found for name in _VIDEO_FILES if (found := _read(folder, name))), {})


def _token_id(tokenizer: Any, token: str) -> int:
    found = tokenizer.encode(token, add_special_tokens=False)
    if len(found) != 1:
        raise DataError(
            f"The tokenizer writes the placeholder token {token!r} as {len(found)} tokens, expected"
            " 1. Take the tokenizer that belongs to the model."
        )
    return int(found[0])
