"""Data described in a YAML file of LLaMA-Factory's v1, and pairs of whole conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longfactory.data.errors import BadRow
from longfactory.data.formats import convert
from longfactory.data.sources import detect, read_sources
from longfactory.errors import DataError

ALPACA = [{"instruction": "Two plus two?", "input": "", "output": "Four."}]
SHAREGPT = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]
OPENING = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
PAIR = {
    "chosen": [*OPENING, {"role": "assistant", "content": "Ho"}],
    "rejected": [*OPENING, {"role": "assistant", "content": "Hm"}],
}
OWN = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "Hi"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Ho"}]},
        ]
    }
]


def test_a_yaml_of_v1_names_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("a", ALPACA), ("s", SHAREGPT), ("p", [PAIR]), ("own", OWN)):
        (data / f"{name}.json").write_text(json.dumps(rows))
    (data / "v1.yaml").write_text(
        "\n".join(
            [
                "first: {path: data/a.json, source: local, converter: alpaca, size: 500}",
                "second: {path: data/s.json, source: local, converter: sharegpt}",
                "third: {path: data/p.json, source: local, converter: pair}",
                "fourth: {path: data/own.json, source: local, weight: 2}",
                "fifth: {path: someone/pairs, split: train_prefs, converter: pair}",
            ]
        )
    )
    told: list[str] = []
    first, second, third, fourth, fifth = read_sources(["data/v1.yaml"], "data", told.append)
    assert (first.name, first.num_samples) == ("first", 500)
    answers = [
        convert(rows[0], source).answers[0].content
        for rows, source in ((ALPACA, first), (SHAREGPT, second), (OWN, fourth))
    ]
    assert answers == ["Four.", "Ho", "Ho"]
    found = convert(PAIR, third)
    assert [m.content for m in found.answers] == ["Ho", "Hm"] and found.system == "Be short."
    assert [m.content for m in found.prompt] == ["Hi"]
    assert (fifth.load_from, fifth.location, fifth.split) == ("hub", "someone/pairs", "train_prefs")
    assert any("weight of fourth has no effect" in line for line in told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {path: x.json, source: local, converter: other}", "known are alpaca, sharegpt, pair"),
        ("a: {source: local}", "a has no path"),
        ("[1, 2]", "expected data sets"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_yaml_that_is_broken_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "v1.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_sources(["v1.yaml"], str(tmp_path))


def test_pairs_of_whole_conversations() -> None:
    entry: Any = detect([PAIR])
    assert entry["ranking"] and entry["formatting"] == "openai" and "messages" not in entry
    (source,) = read_sources(["d"], {"d": {"file_name": "d.json", **entry}})
    assert [m.content for m in convert(PAIR, source).answers] == ["Ho", "Hm"]
    other = {**PAIR, "rejected": [{"role": "user", "content": "Other"}, PAIR["rejected"][-1]]}
    with pytest.raises(BadRow, match="differ before their last message"):
        convert(other, source)
