"""From what people write to what is run: other names for keys, and the keys that transformers 5
renamed or dropped.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from longfactory.config.arguments import GROUPS
from longfactory.config.fields import SHOWN, Key, coerce, is_secret, keys_of, plain, shown, told
from longfactory.config.other_keys import (
    ALIASES,
    ELSEWHERE,
    NO_EFFECT,
    OTHER_FILES,
    REFUSED,
    REFUSED_VALUES,
    Other,
)
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.errors import ConfigError
from longfactory.kernel_names import canonical

# Keys that are read and turned into other keys below.
TURNED: dict[str, Key] = {
    "warmup_ratio": Key(
        "warmup_ratio", float, 0.0, "Share of the steps in which the learning rate rises.", 0.0, 1.0
    ),
    "gradient_checkpointing": Key(
        "gradient_checkpointing", bool | None, None, "On by default; false keeps every activation."
    ),
    "gradient_checkpointing_kwargs": Key(
        "gradient_checkpointing_kwargs",
        dict | str | None,
        None,
        "Recomputation is LongFactory's own.",
    ),
    "use_unsloth_gc": Key("use_unsloth_gc", bool, False, "The same as offload_activations: true."),
    "fsdp": Key("fsdp", bool | tuple[str, ...] | None, None, "full_shard means sharding: fsdp2."),
    "shuffle_for_sequence_parallel": Key(
        "shuffle_for_sequence_parallel", bool, True, "false is the same as disable_shuffling: true."
    ),
    "adafactor": Key("adafactor", bool, False, "The same as optim: adafactor."),
}

OWN_KEYS: dict[str, Key] = {
    name: key for group in GROUPS.values() for name, key in keys_of(group).items()
}
KNOWN: frozenset[str] = frozenset(
    {*OWN_KEYS, *TRAINER_KEYS, *TURNED, *ALIASES, *NO_EFFECT, *REFUSED}
)


def is_switch(name: str) -> bool:
    """Whether `--name` alone means true."""
    name = ALIASES.get(name, name)
    key = OWN_KEYS.get(name) or TRAINER_KEYS.get(name) or TURNED.get(name)
    if key is not None:
        return (
            key.kind is bool
            or key.kind == (bool | None)
            or bool in getattr(key.kind, "__args__", ())
        )
    other = NO_EFFECT.get(name) or REFUSED.get(name)
    return other is not None and any(isinstance(h, bool) for h in other.harmless)


def rename(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every other name replaced by ours.

    Raises:
        ConfigError: a key was given under two names, with different values.
    """
    out: dict[str, Any] = {}
    came_from: dict[str, str] = {}
    for name, value in values.items():
        new = ALIASES.get(name, name)
        if new != name and value is None:
            continue
        if name == "group_by_length":
            value = "group_by_length" if coerce(value, bool, name) else "random"
        elif name == "cp_mode" or (new == "sequence_parallel_mode" and value in ("zigzag", "ring")):
            value = {"zigzag": "zigzag-ring", "ring": "zigzag-ring"}.get(str(value), value)
        elif name == "quantization_method" and value == "bitsandbytes":
            value = "bnb"
        elif name == "infer_backend" and value == "hf":
            value = "huggingface"
        elif new == "attention_backend" and isinstance(value, str):
            value = canonical(value.strip().lower())
        elif name == "debug" and str(value).lower() == "false":
            value = ""
        if new in out and (out[new] is None or value is None):
            value = out[new] if value is None else value
        if new in out and out[new] is not None and _read(new, out[new]) != _read(new, value):
            raise ConfigError(
                f"{came_from[new]} and {name} are the same key with different values"
                f" ({told(new, out[new])}, {told(new, value)}). Keep one."
            )
        out[new] = value
        came_from[new] = name
    return out


def _read(name: str, value: Any) -> Any:
    """The value in its key's type, or as it is written where that cannot be."""
    key = OWN_KEYS.get(name) or TRAINER_KEYS.get(name) or TURNED.get(name)
    try:
        return value if key is None else key.parse(value)
    except ConfigError:
        return value


def other_file(values: Mapping[str, Any]) -> None:
    """Refuses a file that is another program's, by its keys.

    Raises:
        ConfigError: with what it is and what to write instead.
    """
    for other in OTHER_FILES:
        found = [name for name in values if name in other.keys]
        if len(found) >= other.enough and not any(name in OWN_KEYS for name in found):
            raise ConfigError(f"{', '.join(found)}: this is {other.sentence}.")


def known(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The values without unknown keys; what the user should know; and a problem for each unknown
    key, with the nearest known one.

    ALLOW_EXTRA_ARGS=1 turns the problems into notes.
    """
    unknown = [k for k in values if k not in KNOWN]
    if not unknown:
        return dict(values), [], []
    lines = []
    for name in unknown:
        if name.lower() in ELSEWHERE:
            lines.append(f"There is no key {name}. Use {ELSEWHERE[name.lower()]}.")
            continue
        plainly = name[:SHOWN].lower().replace("-", "_")
        near = difflib.get_close_matches(plainly, sorted(KNOWN), n=1, cutoff=0.7)
        lines.append(
            f"There is no key {plain(name)}." + (f" Did you mean {near[0]}?" if near else "")
        )
    rest = {k: v for k, v in values.items() if k not in unknown}
    if os.environ.get("ALLOW_EXTRA_ARGS", "0").lower() in ("1", "true", "y"):
        return rest, [f"{line} It is left out (ALLOW_EXTRA_ARGS)." for line in lines], []
    return rest, [], lines


def drop_others(values: dict[str, Any]) -> list[str]:
    """Takes the keys of `other_keys` out of `values`; returns what the user should know.

    Raises:
        ConfigError: a key that is refused has a value other than its default.
    """
    notes: list[str] = []
    refusals: list[str] = []
    for name in [k for k in values if k in NO_EFFECT or k in REFUSED]:
        value = values.pop(name)
        other = NO_EFFECT.get(name) or REFUSED[name]
        if name == "accelerator_config":
            value = _harmful_entries(value, other)
        if _harmless(value, other):
            continue
        what = _written(name, value)
        if name in NO_EFFECT:
            notes.append(f"{name}: {what} has no effect: {other.sentence}.")
        else:
            refusals.append(f"{name}: {what} is refused: {other.sentence}.")
    for name, sentences in REFUSED_VALUES.items():
        sentence = sentences.get(str(values.get(name)).lower())
        if sentence is not None:
            refusals.append(f"{name}: {_written(name, values[name])} is refused: {sentence}.")
    if refusals:
        raise ConfigError("\n".join(refusals))
    return notes


def _written(name: str, value: Any) -> str:
    """A value as a person writes it, shortened; a secret's is not shown."""
    if isinstance(value, bool):
        return str(value).lower()
    return plain(value) if isinstance(value, str) and not is_secret(name) else told(name, value)


def _harmful_entries(value: Any, other: Other) -> Any:
    """A mapping (or its JSON) without the entries that are harmless one by one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = coerce(value, dict, "accelerator_config")
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if {k: v} not in other.harmless}


def _harmless(value: Any, other: Other) -> bool:
    if value in (None, ""):
        return True
    for harmless in other.harmless:
        if harmless is None:
            if isinstance(value, str) and value.lower() in ("none", "null"):
                return True
        elif isinstance(harmless, (bool, int, float)):
            try:
                if coerce(value, type(harmless), "") == harmless:
                    return True
            except ConfigError:
                pass
        elif value == harmless or (
            isinstance(harmless, str) and str(value).lower() == harmless.lower()
        ):
            return True
    return False


def turn(values: dict[str, Any]) -> list[str]:
    """Takes the keys of `TURNED` out of `values` and puts in what they mean; returns what the user
    should know.

    Raises:
        ConfigError: they contradict another key, or ask for what there is not.
    """
    notes: list[str] = []
    given = {name: TURNED[name].parse(values.pop(name)) for name in list(TURNED) if name in values}

    ratio = given.get("warmup_ratio")
    if ratio:
        steps = coerce(values.get("warmup_steps") or 0, float, "warmup_steps")
        if steps > 0:
            # transformers 4 let the steps win.
            notes.append(
                f"warmup_ratio: {ratio} has no effect: warmup_steps: {steps:g} is given too."
            )
        else:
            # A number below 1 is a share of the steps; the whole run cannot be written as 1.
            values["warmup_steps"] = min(ratio, 1.0 - 1e-9)

    checkpointing = given.get("gradient_checkpointing")
    if checkpointing is False:
        values.setdefault("disable_gradient_checkpointing", True)
    elif checkpointing and coerce(
        values.get("disable_gradient_checkpointing", False), bool, "disable_gradient_checkpointing"
    ):
        raise ConfigError(
            "gradient_checkpointing: true and disable_gradient_checkpointing: true contradict each"
            " other. Keep one of them."
        )
    kwargs = given.get("gradient_checkpointing_kwargs") or {}
    if isinstance(kwargs, dict):
        kwargs = {k: v for k, v in kwargs.items() if k != "use_reentrant"}
    if kwargs:
        raise ConfigError(
            f"gradient_checkpointing_kwargs: {shown(kwargs)} is refused: recomputation is"
            " LongFactory's own; see memory:"
        )

    if given.get("use_unsloth_gc"):
        values.setdefault("offload_activations", True)

    fsdp = given.get("fsdp") or ()
    words = {"full_shard"} if fsdp is True else set(" ".join(fsdp).lower().split())
    if "offload" in words:
        raise ConfigError(
            "fsdp: offload is refused. Use optimizer_placement: host, or a DeepSpeed offload JSON."
        )
    if words and words <= {
        "full_shard",
        "auto_wrap",
        "hybrid_shard",
        "hybrid_shard_zero2",
        "shard_grad_op",
    }:
        values.setdefault("sharding", "fsdp2")
        if words - {"full_shard", "auto_wrap"}:
            notes.append(
                f"fsdp: {' '.join(sorted(words))} is run as full sharding over all devices."
            )
    elif words == {"no_shard"}:
        values.setdefault("sharding", "ddp")
    elif words:
        raise ConfigError(
            f"fsdp: {shown(' '.join(sorted(words)))} is not a choice. Use sharding: fsdp2 or"
            " sharding: ddp."
        )

    if str(values.get("train_sampling_strategy")).lower() == "sequential":
        values.setdefault("disable_shuffling", True)
    if given.get("shuffle_for_sequence_parallel") is False:
        values.setdefault("disable_shuffling", True)
    if given.get("adafactor"):
        values.setdefault("optim", "adafactor")
    return notes
