"""Data described in a YAML file of LLaMA-Factory's v1, and pairs of whole conversations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from longfactory.data.errors import BadRow
from longfactory.data.formats import convert
from longfactory.data.sources import detect, read_sources
from longfactory.data.store import FORMAT
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


def test_the_parts_of_v1(tmp_path: Path) -> None:
    """Its own rows, which need no converter: thoughts, calls and media are parts of a content."""
    image = {"type": "image_url", "value": "data/1.jpg"}
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    parts = [
        {"type": "reasoning", "value": "Look it up."},
        {"type": "text", "value": "One moment."},
        {"type": "tool_call", "value": json.dumps(call)},
    ]
    row = {
        "messages": [
            {"role": "user", "content": [image, {"type": "text", "value": "Which weather?"}]},
            {"role": "assistant", "content": parts, "loss_weight": 0.0},
            {"role": "tool", "content": [{"type": "text", "value": "Rain."}]},
            {"role": "assistant", "content": [{"type": "text", "value": "It rains."}]},
        ],
        "tools": json.dumps([{"name": "weather"}]),
    }
    (source,) = read_sources(["d"], {"d": {"file_name": "d.json", **(detect([row]) or {})}})
    found = convert(row, source)
    assert found.images == ("data/1.jpg",) and found.prompt[0].content == "<image>Which weather?"
    asked = found.prompt[1]
    assert (asked.role, json.loads(asked.content)) == ("function", [call])
    assert (asked.before, asked.thought, asked.trained) == ("One moment.", "Look it up.", False)
    assert found.prompt[2].content == "Rain." and found.tools and not found.unread
    # as a chat template sees it
    assert asked.shown[0]["reasoning_content"] == "Look it up."
    assert asked.shown[0]["tool_calls"] == [{"type": "function", "function": call}]
    assert asked.shown[0]["content"] == [{"type": "text", "text": "One moment."}]
    parts[2]["value"] = "[]"
    with pytest.raises(BadRow, match="must be an object with name and arguments"):
        convert(row, source)


def test_v1_names_pairs_otherwise(tmp_path: Path) -> None:
    shown = {"type": "image_url", "value": "1.jpg"}
    opening = [{"role": "user", "content": [shown, {"type": "text", "value": "Hi"}]}]
    row = {
        f"{which}_messages": [*opening, {"role": "assistant", "content": text}]
        for which, text in (("chosen", "Ho"), ("rejected", "Hm"))
    }
    told: list[str] = []
    entry = {"file_name": "d.json", **(detect([row]) or {})}
    (source,) = read_sources(["d"], {"d": entry}, told.append)
    found = convert(row, source)
    assert [m.content for m in found.answers] == ["Ho", "Hm"] and found.images == ("1.jpg",)
    assert not told


def test_the_converters_of_v1_read_tools_and_media(tmp_path: Path) -> None:
    rows = {
        "alpaca": {"instruction": "<image>What?", "output": "A dog.", "images": ["1.jpg"]},
        "sharegpt": {**SHAREGPT[0], "tools": '[{"name": "f"}]'},
        "pair": {
            "chosen": [{"role": "user", "content": "<image>?"}, PAIR["chosen"][-1]],
            "rejected": [{"role": "user", "content": "<image>?"}, PAIR["rejected"][-1]],
            "images": ["1.jpg"],
        },
    }
    (tmp_path / "v1.yaml").write_text(
        "\n".join(f"{name}: {{path: someone/data, converter: {name}}}" for name in rows)
    )
    sources = read_sources(["v1.yaml"], str(tmp_path))
    alpaca, sharegpt, pair = (convert(rows[s.name], s) for s in sources)
    assert alpaca.images == pair.images == ("1.jpg",)
    assert sharegpt.tools == '[{"name": "f"}]'


def test_rows_that_are_read_otherwise_have_another_format(tmp_path: Path) -> None:
    """Caches are named by FORMAT and not by the code that reads rows: where this fails because rows
    come to be read otherwise, raise FORMAT and write down the new digest.
    """
    parts = [
        {"type": "reasoning", "value": "Hm."},
        {"type": "text", "value": "Ho"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    first = {"role": "assistant", "content": parts, "loss_weight": 0.0}
    result = {"role": "tool", "content": "1"}
    last = {"role": "assistant", "content": "Ho", "weight": 1, "reasoning_content": "So."}
    rows = [{"messages": [*OPENING, first, result, last]}, PAIR, ALPACA[0], SHAREGPT[0], OWN[0]]
    found = []
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.json").write_text(json.dumps([row]))
        source = read_sources([f"{i}.json"], str(tmp_path), lambda text: None)[0]
        read = convert(row, source)
        found.append(repr((read.prompt, read.answers, read.system, read.tools)))
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]
    assert (FORMAT, digest) == (3, "44fa7f045589")


def test_a_thought_in_a_part_and_another_in_a_field_are_a_bad_row(tmp_path: Path) -> None:
    answer = {
        "role": "assistant",
        "content": [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Ho"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([{"messages": [*OPENING, answer]}]))
    source = read_sources(["d.json"], str(tmp_path), lambda text: None)[0]
    same = {"messages": [*OPENING, answer | {"thinking": "Hm."}]}
    assert convert(same, source).answers[0].thought == "Hm."
    with pytest.raises(BadRow, match="two thoughts"):
        convert({"messages": [*OPENING, answer | {"thinking": "No."}]}, source)
    with pytest.raises(BadRow, match="two thoughts"):
        convert({"messages": [*OPENING, answer | {"reasoning_content": "No."}]}, source)
