"""Typed keys: how a field is declared, and how what a person wrote becomes a value of the declared
type.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from longfactory.errors import ConfigError

TRUE = frozenset({"true", "yes", "on", "1"})
FALSE = frozenset({"false", "no", "off", "0"})
NULL = frozenset({"null", "none", "~", ""})


def arg(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A key with its default, one sentence of help, and the range (both ends allowed) that its
    numbers must lie in.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Key:
    """What is known of one key, whoever reads it."""

    name: str
    kind: Any
    default: Any
    help: str = ""
    low: float | None = None
    high: float | None = None

    def parse(self, value: Any) -> Any:
        """The value in the declared type. A null where the type has none is the default.

        Raises:
            ConfigError: another type, no such choice, or out of range; a null for a switch that is
                on by default.
        """
        if value is None and not _takes_null(self.kind):
            if self.kind is bool and self.default:
                raise _wrong(self.name, value, "true or false")
            return self.default
        parsed = coerce(value, self.kind, self.name)
        for number in parsed if isinstance(parsed, tuple) else (parsed,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if (self.low is not None and number < self.low) or (
                self.high is not None and number > self.high
            ):
                raise ConfigError(
                    f"{self.name}: got {number}, expected {_range(self.low, self.high)}."
                )
        return parsed


def _takes_null(kind: Any) -> bool:
    return types.NoneType in typing.get_args(kind) or typing.get_origin(kind) is tuple


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f">= {low}"
    return f"<= {high}" if low is None else f"a number from {low} to {high}"


@functools.cache
def keys_of(cls: Any) -> Mapping[str, Key]:
    """The keys of a dataclass of arguments, in the order in which they are written."""
    hints = typing.get_type_hints(cls)
    return types.MappingProxyType(
        {
            f.name: Key(f.name, hints[f.name], f.default, **f.metadata)
            for f in dataclasses.fields(cls)
        }
    )


def describe(kind: Any) -> str:
    """The type in words that a person who never saw Python understands."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " | ".join(
            str(x).lower() if isinstance(x, bool) else str(x) for x in typing.get_args(kind)
        )
    if origin in (typing.Union, types.UnionType):
        return " | ".join(describe(k) for k in typing.get_args(kind) if k is not types.NoneType)
    if origin is tuple:
        return f"comma list of {describe(typing.get_args(kind)[0])}"
    words = {
        bool: "true | false",
        int: "whole number",
        float: "number",
        str: "text",
        dict: "mapping",
    }
    return words.get(origin or kind, "value")


def coerce(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`: strings that spell a number or a boolean are read, comma lists and YAML
    lists are both lists.

    Raises:
        ConfigError: the value cannot be read as that type.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(value, typing.get_args(kind), name)
    if origin is Literal:
        return _choice(value, typing.get_args(kind), name)
    if origin is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(coerce(x, inner, name) for x in _items(value, name))
    reader: Any = {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}[origin or kind]
    return reader(value, name)


def _union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    if types.NoneType in kinds and (
        value is None or (isinstance(value, str) and value.strip().lower() in NULL)
    ):
        return None
    rest = [k for k in kinds if k is not types.NoneType]
    # A type that the value has already comes first; text last, since anything can be read as text.
    rest.sort(key=lambda k: (k is str, not (isinstance(k, type) and type(value) is k)))
    error: ConfigError | None = None
    for k in rest:
        try:
            return coerce(value, k, name)
        except ConfigError as e:
            error = error or e
    assert error is not None
    if len(rest) == 1:
        raise error
    raise _wrong(name, value, " | ".join(describe(k) for k in rest))


def _wrong(name: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{name}: got {value!r}, expected {needed}.")


def _choice(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    text = str(value).strip().lower()
    for choice in choices:
        if str(choice).lower() == text:
            return choice
    if text in TRUE | FALSE:
        # YAML reads the bare words no and off, yes and on, as booleans.
        for choice in choices:
            if isinstance(choice, str) and choice in (TRUE if text in TRUE else FALSE):
                return choice
    given = str(value).lower() if isinstance(value, bool) else value
    raise ConfigError(
        f"{name}: {given!r} is not a choice. Choose from {', '.join(str(c) for c in choices)}."
    )


def _items(value: Any, name: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        if value.strip().lower() in NULL:
            return []
        return [x.strip() for x in value.split(",") if x.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        raise _wrong(name, value, "a list, or text with commas")
    return [value]


def _bool(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise _wrong(name, value, "true or false")


def _int(value: Any, name: str) -> int:
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = int(value) if isinstance(value, (int, str)) else float(value)
        except ValueError:
            number = _float(value, name, "a whole number")
        if number == int(number):
            return int(number)
    raise _wrong(name, value, "a whole number")


def _float(value: Any, name: str, needed: str = "a number") -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            if abs(number) != float("inf") and number == number:
                return number
    raise _wrong(name, value, needed)


def _str(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        # 1e5 and 1.10 would come back as other texts.
        raise ConfigError(f"{name}: got the number {value!r}, expected text. Put it in quotes.")
    raise _wrong(name, value, "text")


def _dict(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as e:
            raise ConfigError(f"{name}: not valid JSON ({e}).") from e
    if isinstance(value, dict):
        return value
    raise _wrong(name, value, "a mapping (or JSON text)")
