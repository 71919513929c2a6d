"""What the data layer asks of its arguments. The dataclass itself belongs to the configuration; anything with these fields will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

Stage = Literal["pt", "sft", "rm", "ppo", "dpo", "kto"]
CutoffStrategy = Literal["llamafactory", "drop", "error", "keep_tail"]


class DataArguments(Protocol):
    """LLaMA-Factory's data keys. `dataset` and its kin are a name, a comma list, or a list of names."""

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
}


def option(args: DataArguments, name: str) -> Any:
    """The value of a key that not every caller's arguments have."""
    value = getattr(args, name, None)
    return DEFAULTS[name] if value is None else value


def names(value: str | Sequence[Any] | None) -> list[str]:
    """`"a, b"`, `["a", "b"]` or None -> a list of names."""
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else list(value)
    return [str(p).strip() for p in parts if str(p).strip()]


def probabilities(args: DataArguments) -> list[float] | None:
    """`interleave_probs` as numbers, or None."""
    found = names(args.interleave_probs)
    try:
        return [float(p) for p in found] or None
    except ValueError:
        raise ValueError(f"interleave_probs needs numbers, for example 0.7,0.3; found {args.interleave_probs!r}.") from None


def packs(args: DataArguments, stage: str) -> bool:
    """Whether documents are packed: `packing: null` packs in pre-training only; other stages than pt and sft never pack."""
    if stage not in ("pt", "sft"):
        return False
    if args.neat_packing:
        return True
    return stage == "pt" if args.packing is None else bool(args.packing)
