"""What public training YAMLs for LLaMA-Factory and its 360 fork say goes on resolving, or being
refused with the known sentence.

`public_keys.json` was distilled from 420 different ones (of LLaMA-Factory's examples in every
version, and of forks). `keys` maps each key to the values that were seen (names and paths are
replaced by letters), with the verdict of each by itself. `together` holds the settings that resolve
together and that checks compare with one another.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping

SEEN = json.loads((Path(__file__).parent / "public_keys.json").read_text(encoding="utf-8"))
BASE: dict[str, Any] = {
    "model_name_or_path": "m",
    "dataset": "d",
    "output_dir": "nowhere/out",
    "dry_run": True,
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's files are named by their path from the repository's root."""
    monkeypatch.chdir(Path(__file__).parents[2])


def run_with(key: str, value: Any) -> dict[str, Any]:
    return {**BASE, **({} if key == "eval_dataset" else {"val_size": 0.1}), key: value}


def test_what_resolved_resolves() -> None:
    lost = {}
    for key, verdicts in SEEN["keys"].items():
        for value in verdicts.get("resolves", []):
            try:
                from_mapping(run_with(key, value))
            except ConfigError as e:
                lost[f"{key}: {value}"] = str(e)
    assert lost == {}


def test_settings_that_resolved_together_do() -> None:
    assert len(SEEN["together"]) > 50
    lost = {}
    for settings in SEEN["together"]:
        try:
            from_mapping({**BASE, **settings})
        except ConfigError as e:
            lost[str(settings)] = str(e)
    assert lost == {}


def test_what_was_refused_has_its_sentence() -> None:
    other = {}
    for key, verdicts in SEEN["keys"].items():
        for sentence, values in verdicts.get("refused", {}).items():
            for value in values:
                try:
                    from_mapping(run_with(key, value))
                    told = "resolves"
                except ConfigError as e:
                    told = str(e)
                if not told.startswith(sentence):
                    other[f"{key}: {value}"] = told
    assert other == {}


def test_text_says_the_same_as_a_value() -> None:
    """On the command line everything is text, and YAML files quote what they like: "0.1", "True",
    "[a, b]" of a value are the value.
    """
    for key, verdicts in SEEN["keys"].items():
        for value in verdicts.get("resolves", []):
            if value is None or isinstance(value, (dict, list)):
                continue
            a, b = from_mapping(run_with(key, value)), from_mapping(run_with(key, str(value)))
            assert dataclasses.replace(a, notes=()) == dataclasses.replace(b, notes=()), (
                f"{key}: {value!r}"
            )
            assert len(a.notes) == len(b.notes), f"{key}: {value!r}"
