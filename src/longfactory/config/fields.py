"""Typed keys: how a field is declared, and how what a person wrote becomes a value of the declared
type. What is known of a key (range, secret, path) stands beside its field and nowhere else.

Not pydantic: most of what is here it does not have (comma lists beside YAML lists, YAML's bare no
and off as names of choices, a null that means the default, secrets that no message shows, ranges of
each number in a list), and each key's sentence would have to be made from its errors again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from longfactory.errors import ConfigError

TRUE = frozenset({"true", "yes", "on", "1"})
FALSE = frozenset({"false", "no", "off", "0"})
NULL = frozenset({"null", "none", "~", ""})


SHOWN = 80
"""Characters of a value that a message shows."""
PATH_SHOWN = 1000
"""Of a path."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes of a file's name, and of a path: what Linux's file systems take."""


def arg(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    secret: bool = False,
    path: bool = False,
) -> Any:
    """A key with its default, one sentence of help, and what is known of its values.

    Args:
        default: its value where it is not given.
        help: one sentence.
        low, high: the range that its numbers must lie in, both ends allowed.
        above, below: the same, without the ends.
        secret: no message, file or log shows the value.
        path: its texts name files or folders.
    """
    facts = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(
        default=default,
        repr=not secret,
        metadata={"help": help, "secret": secret, "path": path, **facts},
    )


@dataclasses.dataclass(frozen=True)
class Key:
    """What is known of one key, whoever reads it."""

    name: str
    kind: Any
    default: Any
    help: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    secret: bool = False
    path: bool = False

    def parse(self, value: Any) -> Any:
        """The value in the declared type. A null where the type has none is the default.

        Raises:
            ConfigError: another type, no such choice, out of range, or no possible path; a null for
                a switch that is on by default.
        """
        if value is None and not _takes_null(self.kind):
            if self.kind is bool and self.default:
                raise _wrong(self.name, value, "true or false")
            return self.default
        try:
            parsed = coerce(value, self.kind, self.name)
        except ConfigError:
            if not self.secret:
                raise
            raise ConfigError(
                f"{self.name}: got a value of another type {HIDDEN}, expected"
                f" {describe(self.kind)}."
            ) from None
        for part in parsed if isinstance(parsed, tuple) else (parsed,):
            problem = self._problem(part)
            if problem is not None:
                raise ConfigError(f"{self.name}: {problem}")
        return parsed

    def _problem(self, value: Any) -> str | None:
        """What is wrong with a value of the right type, or None."""
        if isinstance(value, str):
            return _text_problem(value, path=self.path, secret=self.secret)
        if isinstance(value, dict):
            return _mapping_problem(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        expected = self._expected(value)
        return None if expected is None else f"got {shown(value)}, expected {expected}."

    def _expected(self, number: float) -> str | None:
        """The bound that a number breaks, in words; both for a share; None where it breaks none."""
        under = (self.low is not None and number < self.low) or (
            self.above is not None and number <= self.above
        )
        over = (self.high is not None and number > self.high) or (
            self.below is not None and number >= self.below
        )
        if not under and not over:
            return None
        least = _bound(">= ", self.low) or _bound("> ", self.above)
        most = _bound("<= ", self.high) or _bound("< ", self.below)
        if (self.low, self.high) == (0, 1):
            return "a number from 0 to 1"
        if (self.high or self.below or 2) <= 1:
            return f"{least} and {most}"
        return least if under else most


def _bound(sign: str, number: float | None) -> str:
    return "" if number is None else f"{sign}{_number(number)}"


def _number(number: float) -> str:
    """A bound as a person writes it."""
    if isinstance(number, int) and abs(number) < 10**6:
        return str(number)
    return f"{number:.10g}"


def shown(value: Any) -> str:
    """A value as a message shows it: what Python writes of it, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or more lists in lists, than Python writes
        text = f"a {type(value).__name__}"
    return _shortened(text)


def plain(text: str) -> str:
    """A text as a message shows it without quotes, shortened."""
    return _shortened(text if text.isprintable() else repr(text)[1:-1])


def whole_path(path: Any) -> str:
    """A path as a message shows it: whole, as a shortened one names no file."""
    text = str(path)
    return _shortened(text if text.isprintable() else repr(text)[1:-1], PATH_SHOWN)


def _shortened(text: str, most: int = SHOWN) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most - 30]}... ({len(text)} characters)"


SECRETS = ("token", "api_key", "password", "secret")
"""How the names of keys end whose values are secrets, this project's and others'."""
HIDDEN = "(a secret, not shown)"


def is_secret(name: str) -> bool:
    """Whether no message may show the value of a key of this name."""
    return name.lower().endswith(SECRETS)


def told(name: str, value: Any) -> str:
    """A key's value as a message shows it."""
    return HIDDEN if is_secret(name) else shown(value)


def _text_problem(text: str, *, path: bool, secret: bool) -> str | None:
    """Why a text cannot be used, or None."""
    what = f"a value {HIDDEN}" if secret else shown(text)
    if "\0" in text:
        return f"got {what}, with a character of code 0, expected text."
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError:
        return f"got {what}, which is not valid Unicode, expected text."
    if not path:
        return None
    if len(encoded) > LONGEST_PATH:
        return f"got a path of {len(encoded)} bytes, expected at most {LONGEST_PATH}."
    longest = max((len(part) for part in encoded.split(b"/")), default=0)
    if longest > LONGEST_NAME and not text.lstrip().startswith("{"):
        return (
            f"got {what}, which holds a name of {longest} bytes, expected names of at most"
            f" {LONGEST_NAME}."
        )
    return None


def _mapping_problem(value: Any) -> str | None:
    """Which number in a mapping is none, or None."""
    if isinstance(value, dict):
        return next((p for p in map(_mapping_problem, value.values()) if p is not None), None)
    if isinstance(value, (list, tuple)):
        return next((p for p in map(_mapping_problem, value) if p is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"got {value!r} inside, expected finite numbers."
    return None


def _takes_null(kind: Any) -> bool:
    return types.NoneType in typing.get_args(kind) or typing.get_origin(kind) is tuple


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
    rest.sort(key=lambda k: (k is str, not _is_already(value, k)))
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


def _is_already(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    return isinstance(kind, type) and type(value) is kind


def _wrong(name: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{name}: got {shown(value)}, expected {needed}.")


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
        f"{name}: {shown(given)} is not a choice. Choose from {', '.join(str(c) for c in choices)}."
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
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wrong(name, value, "a whole number")
    if not isinstance(value, float):
        try:
            return int(value)
        except ValueError:  # 1e4, which is a float's text
            pass
    number = _float(value, name, "a whole number")
    if number != int(number):
        raise _wrong(name, value, "a whole number")
    return int(number)


def _float(value: Any, name: str, needed: str = "a number") -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            pass
        else:
            if math.isfinite(number):
                return number
    raise _wrong(name, value, needed)


def _str(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # more digits than Python writes
            raise _wrong(name, value, "text") from None
    if isinstance(value, float):
        # 1e5 and 1.10 would come back as other texts.
        raise ConfigError(f"{name}: got the number {value!r}, expected text. Put it in quotes.")
    raise _wrong(name, value, "text")


def _dict(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{name}: not valid JSON ({e}).") from e
    if isinstance(value, dict):
        return value
    raise _wrong(name, value, "a mapping (or JSON text)")
