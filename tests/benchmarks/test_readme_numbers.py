"""The numbers of README's section "Measured" stand on the pages that it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
LINK = re.compile(r"\]\((benchmarks/results/[^)#]+\.(?:md|json))\)")


def blocks() -> list[str]:
    """Tables with the sentence after them, sentences, and points of a list."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## Measured\n") :].split("\n## ")[1]
    found = re.split(r"\n\n|\n(?=- )", section.split("\n", 1)[1])
    return [block for block in found if NUMBER.search(block)]


def values(text: str) -> list[tuple[float, int]]:
    """Numbers of a text, and their decimals."""
    found = []
    for match in NUMBER.findall(text):
        number = match.strip(",").replace(",", "")
        mantissa = number.split("e")[0]
        decimals = len(mantissa.partition(".")[2])
        exponent = int(number.partition("e")[2] or 0)
        found.append((float(number), decimals - exponent))
    return found


def unknown(block: str, pages: str) -> list[float]:
    """Numbers of a block that are on none of its pages, to the block's decimals, and that are no
    ratio of two others of the block ("1.43x"). Small whole numbers count things.
    """
    known = [value for value, _ in values(pages)]
    known += [1024 * int(thousands) for thousands in re.findall(r"\b(\d+)k\b", pages)]
    plain = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", block)
    own = [value for value, _ in values(plain) if value]
    missing = []
    for value, decimals in values(plain):
        if value == int(value) and value < 32 and decimals == 0:
            continue
        if any(round(k, decimals) == value for k in known):
            continue
        if decimals == 2 and any(round(a / b, 2) == value for a in own for b in own):
            continue
        missing.append(value)
    return missing


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block[:40].strip("-|* "))
def test_numbers_stand_on_the_pages_that_are_linked(block: str) -> None:
    pages = [ROOT / link for link in LINK.findall(block)]
    assert pages, f"no page of benchmarks/results is linked beside these numbers: {block}"
    text = "\n".join(
        path.read_text()
        for page in pages
        for path in (page, page.with_suffix(".json"))
        if path.is_file()
    )
    assert not unknown(block, text), f"on none of {[page.name for page in pages]}"


def test_a_number_that_was_not_measured_is_seen() -> None:
    page = "| tokens/s | 3,819 | 2,667 | 86.94 GiB | 2.31e-05 |"
    assert not unknown("3,819 (1.43x of 2,667), 86.9 GiB, 2.3e-5, 4 of 28 layers", page)
    assert unknown("3,820 and 86.8 GiB, 2.4e-5", page) == [3820.0, 86.8, 2.4e-05]
