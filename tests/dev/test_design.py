"""docs/design.md draws the rooms as the import-linter contract and the tree have them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def drawn_rooms() -> list[list[str]]:
    """The rooms of each line of the picture, top to bottom."""
    text = (ROOT / "docs" / "design.md").read_text()
    section = text[text.index("## 5. The house") :]
    lines = re.findall(r"^    (\w+(?:, \w+)*)  ", section.split("| room |")[0], re.MULTILINE)
    return [line.split(", ") for line in lines]


def test_the_picture_of_the_house_is_the_contract_of_import_linter() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert drawn_rooms() == [layer.split(" | ") for layer in layers]


def test_every_room_of_the_tree_has_its_line() -> None:
    package = ROOT / "src" / "longfactory"
    rooms = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert rooms - {"__init__"} == {room for line in drawn_rooms() for room in line}
    table = (ROOT / "docs" / "design.md").read_text().split("| room |")[1]
    described = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE)
    assert described == [room for line in drawn_rooms() for room in line]
