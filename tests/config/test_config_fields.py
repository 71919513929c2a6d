"""What a person wrote becomes a value of the declared type, or a sentence."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longfactory.config.fields import Key, coerce
from longfactory.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-4", float, 1e-4),
        (1, float, 1.0),
        ("2.5", float, 2.5),
        ("16", int, 16),
        (16.0, int, 16),
        ("1e4", int, 10000),
        ("180000000", int, 180000000),
        ("True", bool, True),
        ("no", bool, False),
        (0, bool, False),
        (False, Literal["no", "steps"], "no"),  # YAML reads the word no as false
        ("Steps", Literal["no", "steps"], "steps"),
        ("4", Literal[4, 8] | None, 4),
        ("null", int | None, None),
        ("none", str | None, None),
        (None, tuple[str, ...], ()),
        ("a, b,c", tuple[str, ...], ("a", "b", "c")),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        ("0.7,0.3", tuple[float, ...], (0.7, 0.3)),
        ([0.7, "0.3"], tuple[float, ...], (0.7, 0.3)),
        (8, tuple[str, ...], ("8",)),
        (7, str, "7"),
        ('{"a": 1}', dict | str | None, {"a": 1}),
        ("ds.json", dict | str | None, "ds.json"),
        ("auto", int | Literal["auto"], "auto"),
        ("512", int | Literal["auto"], 512),
        ("0.5", float | Literal["auto"], 0.5),
        ("true", bool | Literal["auto"], True),
        (True, bool | str | None, True),
    ],
)
def test_reads(value: Any, kind: Any, expected: Any) -> None:
    result = coerce(value, kind, "key")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("abc", float, "a number"),
        ("nan", float, "a number"),
        ("1.5", int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        ("inf", int, "a whole number"),
        (None, int, "a whole number"),
        ("maybe", bool, "true or false"),
        (2, bool, "true or false"),
        ("sgd", Literal["adam", "lion"], "Choose from adam, lion"),
        (True, str, "text"),
        (1e5, str, "Put it in quotes"),
        ([1], str, "text"),
        ({"a": 1}, tuple[str, ...], "a list"),
        ("{bad", dict, "not valid JSON"),
        ("5", Literal[4, 8], "Choose from 4, 8"),
    ],
)
def test_refuses_in_words(value: Any, kind: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="key: ") as e:
        coerce(value, kind, "key")
    assert words in str(e.value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_numbers_survive_being_text(x: float, n: int) -> None:
    assert coerce(repr(x), float, "key") == x
    assert coerce(str(n), int, "key") == n


@given(
    st.lists(
        st.text(alphabet="abcdefgh_.0123456789", min_size=1).filter(
            lambda s: s.lower() not in ("none", "null")
        ),
        min_size=1,
    )
)
def test_comma_lists_are_yaml_lists(names: list[str]) -> None:
    assert (
        coerce(", ".join(names), tuple[str, ...], "key")
        == coerce(names, tuple[str, ...], "key")
        == tuple(names)
    )


def test_ranges() -> None:
    key = Key("share", tuple[float, ...], (), low=0, high=1)
    assert key.parse("0,1") == (0.0, 1.0)
    with pytest.raises(ConfigError, match=r"share: got 1\.5, expected a number from 0 to 1"):
        key.parse("0.2,1.5")
    with pytest.raises(ConfigError, match="n: got 0, expected >= 1"):
        Key("n", int, 1, low=1).parse(0)
