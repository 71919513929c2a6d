"""What the data layer asks of its arguments. The dataclass itself belongs to the configuration;
anything with these fields will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from longfactory.config.stage_facts import STAGES
from longfactory.errors import DataError


class DataSettings(Protocol):
    """LLaMA-Factory's data keys. `dataset` and its kin are a name, a comma list, or a list of
    names.
    """

    dataset: str | Sequence[str] | None
    eval_dataset: str | Sequence[str] | None
    dataset_dir: str
    template: str | None
    cutoff_len: int
    train_on_prompt: bool
    mask_history: bool
    streaming: bool
    buffer_size: int
    mix_strategy: str
    interleave_probs: str | Sequence[float] | None
    overwrite_cache: bool
    preprocessing_batch_size: int
    preprocessing_num_workers: int | None
    max_samples: int | None
    val_size: float
    packing: bool | None
    neat_packing: bool
    tool_format: str | None
    default_system: str | None
    enable_thinking: bool | None
    preserve_thinking: bool
    tokenized_path: str | None


# Keys of our own, and keys that only some callers have: read through `option`.
DEFAULTS: dict[str, Any] = {
    "cutoff_strategy": "llamafactory",
    "on_bad_row": "skip",
    "template_compat": None,
    "pref_share_prompt": False,
    "eval_on_each_dataset": False,
    "hf_hub_token": None,
    "data_shared_file_system": False,
    "disable_shuffling": False,
    "equal_pairs": False,
    "do_predict": False,
    "do_eval": False,
    "media_dir": None,
    "media_allow": (),
    "image_max_pixels": 768 * 768,
    "image_min_pixels": 32 * 32,
    "image_do_pan_and_scan": False,
    "crop_to_patches": False,
    "video_max_pixels": 256 * 256,
    "video_min_pixels": 16 * 16,
    "video_fps": 2.0,
    "video_maxlen": 128,
}


def option(args: DataSettings, name: str) -> Any:
    """The value of a key that not every caller's arguments have."""
    value = getattr(args, name, None)
    return DEFAULTS[name] if value is None else value


def names(value: str | Sequence[Any] | None) -> list[str]:
    """`"a, b"`, `["a", "b"]` or None -> a list of names."""
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else list(value)
    return [str(p).strip() for p in parts if str(p).strip()]


STRATEGIES = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def check_mix(args: DataSettings) -> str:
    """`mix_strategy`, which is concat or one of `STRATEGIES`.

    Raises:
        DataError: it is neither.
    """
    if args.mix_strategy != "concat" and args.mix_strategy not in STRATEGIES:
        raise DataError(
            f"mix_strategy is {args.mix_strategy!r}; known are concat, {', '.join(STRATEGIES)}."
        )
    return args.mix_strategy


def probabilities(args: DataSettings, count: int) -> list[float] | None:
    """`interleave_probs` as one number for each of `count` data sets, which add up to 1; None where
    it is not given.

    Raises:
        DataError: not numbers, not as many, or negative.
    """
    found = names(args.interleave_probs)
    if not found:
        return None
    try:
        chances = [float(p) for p in found]
    except ValueError:
        raise DataError(
            f"interleave_probs needs numbers, for example 0.7,0.3; found {args.interleave_probs!r}."
        ) from None
    if len(chances) != count:
        raise DataError(f"interleave_probs has {len(chances)} numbers for {count} data sets.")
    total = sum(chances)
    if not all(0 <= p < math.inf for p in chances) or total <= 0:
        raise DataError(
            "interleave_probs needs numbers from 0 on that are not all 0; found"
            f" {args.interleave_probs!r}."
        )
    return chances if math.isclose(total, 1.0, abs_tol=1e-9) else [p / total for p in chances]


def packs(args: DataSettings, stage: str) -> bool:
    """Whether documents are packed: `packing: null` packs in pre-training only; stages whose rows
    hold pairs or labelled answers never pack.
    """
    facts = STAGES[stage]
    if not facts.packs:
        return False
    if args.neat_packing:
        return True
    return facts.packs_by_default if args.packing is None else bool(args.packing)
