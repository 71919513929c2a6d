"""docs/layers.md says of each family what its layers do."""

from __future__ import annotations

import pathlib
import re

import pytest

from longfactory.memory.layer.families import FAMILIES
from longfactory_dev.layers import exact_families, look

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def page() -> tuple[dict[str, str], str]:
    """The hand-written families and which of their layers; and the table of the others."""
    text = (DOCS / "layers.md").read_text()
    yes, _, no = text.partition("\n## Layers that run transformers' code\n")
    return dict(re.findall(r"^\| ([a-z0-9_]+) \| ([^|]+) \|", yes, re.MULTILINE)), no


@pytest.mark.slow  # as the page itself, which follows docs/models.md
def test_the_page_has_every_exact_family() -> None:
    yes, no = page()
    others = {
        n
        for names in re.findall(r"^\| ([a-z0-9_, ]+) \|", no, re.MULTILINE)
        for n in names.split(", ")
    }
    assert yes.keys() | (others - {"model type"}) == set(
        exact_families((DOCS / "models.md").read_text())
    )
    assert not yes.keys() & others


def says(family: str) -> None:
    found, (yes, _) = look(family), page()
    if found.written:
        wanted = "all" if found.written == found.layers else f"{found.written} of {found.layers}"
        assert yes[family] == wanted
    else:
        assert family not in yes


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "llama4_text", "minicpm3"])
def test_the_page_is_true(family: str) -> None:
    says(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(exact_families((DOCS / "models.md").read_text())))
def test_the_page_is_true_of_every_family(family: str) -> None:
    says(family)


def test_every_family_of_the_recogniser_is_on_the_page() -> None:
    yes, _ = page()
    missing = {f for f in FAMILIES if not yes.keys() & {f, f"{f}_text", f"{f}_thinker"}}
    assert not missing
