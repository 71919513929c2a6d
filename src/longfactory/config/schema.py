"""The JSON schema of a run's YAML, for editors: keys with their types, choices, ranges and meaning.

It is made from the same declarations that check a run (`fields`), so that it cannot say anything
else; what depends on several keys at once is for the check alone.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from longfactory.config.arguments import GROUPS
from longfactory.config.fields import Key, keys_of
from longfactory.config.other_keys import ALIASES, NO_EFFECT
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import TURNED


def schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    keys = {name: key for cls in GROUPS.values() for name, key in keys_of(cls).items()}
    keys |= {**TRAINER_KEYS, **TURNED}
    properties = {name: of_key(key) for name, key in keys.items()}
    for name, other in ALIASES.items():
        properties[name] = {
            **properties.get(other, {}),
            "description": f"Another name of {other}.",
        }
    for name, found in NO_EFFECT.items():
        properties.setdefault(name, {"description": f"No effect: {found.sentence}."})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of LongFactory",
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": False,
    }


def of_key(key: Key) -> dict[str, Any]:
    """One key."""
    found = of_kind(key.kind, _bounds(key))
    if key.help:
        found["description"] = key.help
    if key.default is not None and key.default != () and not key.secret:
        found["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    return found


def of_kind(kind: Any, bounds: dict[str, float]) -> dict[str, Any]:
    """A type. Where a list may be written as text with commas, both are allowed."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices: list[Any] = list(typing.get_args(kind))
        # YAML reads the bare words no and off as false, yes and on as true.
        if {"no", "off"} & set(map(str, choices)):
            choices.append(False)
        if {"yes", "on"} & set(map(str, choices)):
            choices.append(True)
        return {"enum": choices}
    if origin in (typing.Union, types.UnionType):
        parts = [of_kind(part, bounds) for part in typing.get_args(kind)]
        return {"anyOf": parts}
    if origin is tuple:
        each = of_kind(typing.get_args(kind)[0], bounds)
        return {"anyOf": [{"type": "array", "items": each}, {"type": ["string", "number", "null"]}]}
    words: dict[Any, dict[str, Any]] = {
        bool: {"type": "boolean"},
        int: {"type": "number", "multipleOf": 1, **bounds},
        float: {"type": "number", **bounds},
        str: {"type": "string"},
        dict: {"type": ["object", "string"]},
        types.NoneType: {"type": "null"},
    }
    return dict(words.get(origin or kind, {}))


def _bounds(key: Key) -> dict[str, float]:
    named = {
        "minimum": key.low,
        "maximum": key.high,
        "exclusiveMinimum": key.above,
        "exclusiveMaximum": key.below,
    }
    return {name: value for name, value in named.items() if value is not None}
