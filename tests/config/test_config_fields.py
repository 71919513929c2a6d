"""What a person wrote becomes a value of the declared type, or a sentence."""

from __future__ import annotations

import math
import typing
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longfactory.config.fields import Key, coerce, is_secret
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import OWN_KEYS, TURNED
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


NUMERIC = [
    key
    for key in (OWN_KEYS | TRAINER_KEYS | TURNED).values()
    if {int, float} & {key.kind, *typing.get_args(key.kind)}
]


def test_there_are_many_numeric_keys() -> None:
    assert len(NUMERIC) > 60


@pytest.mark.parametrize("key", NUMERIC, ids=lambda key: key.name)
@pytest.mark.parametrize(
    "value", [1e30, -1e30, 10**400, "9" * 400, "9" * 5000, "1e400", float("inf"), float("nan")]
)
def test_every_number_has_a_range_with_two_ends(key: Key, value: Any) -> None:
    bounds = {key.low, key.above}, {key.high, key.below}
    assert all(found != {None} for found in bounds), "a range with two ends"
    with pytest.raises(ConfigError, match=f"^{key.name}: ") as e:
        key.parse(value)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("adam_beta1", -0.5, "got -0.5, expected >= 0 and < 1"),
        ("adam_beta2", 1, "got 1.0, expected >= 0 and < 1"),
        ("adam_epsilon", 0, "got 0.0, expected > 0 and <= 1"),
        ("lora_dropout", 1.0, "got 1.0, expected >= 0 and < 1"),
        ("weight_decay", 1e30, "got 1e+30, expected <= 100"),
        ("nproc_per_node", "1e30", "expected <= 4096"),
        ("learning_rate", -1e-4, "got -0.0001, expected >= 0"),
        ("output_dir", "x" * 300, "a name of 300 bytes, expected names of at most 255"),
        ("output_dir", "x/" * 3000, "a path of 6000 bytes, expected at most 4095"),
        ("dataset", "a,b\0", "a character of code 0"),
        ("model_name_or_path", "\ud800", "not valid Unicode"),
        ("lr_scheduler_kwargs", {"a": [{"b": math.inf}]}, "got inf inside, expected finite"),
        ("val_size", "x" * 1000, "(1002 characters)"),
    ],
)
def test_what_is_found_and_expected(name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        (OWN_KEYS | TRAINER_KEYS)[name].parse(value)
    assert words in str(e.value) and str(e.value).startswith(f"{name}: ")


def test_secrets_are_those_that_names_tell() -> None:
    keys = (OWN_KEYS | TRAINER_KEYS).values()
    assert {k.name for k in keys if k.secret} == {k.name for k in keys if is_secret(k.name)}
    assert [k.name for k in keys if k.secret] == ["hf_hub_token", "swanlab_api_key", "hub_token"]
    for value in ({"a": "TOKEN"}, "TOKEN\0", ["TOKEN"], "TOKEN\ud800"):
        with pytest.raises(ConfigError) as e:
            TRAINER_KEYS["hub_token"].parse(value)
        assert "TOKEN" not in str(e.value) and str(e.value).startswith("hub_token: ")
