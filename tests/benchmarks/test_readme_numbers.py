"""The numbers of README's section "Measured" stand on the pages that it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
LINK = re.compile(r"\]\((benchmarks/results/[^)#]+\.(?:md|json))\)")
NAMED = re.compile(r"\]\(benchmarks/results/[^)]+\)(?:, \[[^\]]+\]\(benchmarks/results/[^)]+\))*")
"""One page or several, named one after the other."""


def claims() -> list[str]:
    """Tables; of sentences and points of a list each part that ends with its pages."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## Measured\n") :].split("\n## ")[1]
    found = []
    for block in re.split(r"\n\n|\n(?=- )", section.split("\n", 1)[1]):
        ends = [] if block.startswith("|") else [match.end() for match in NAMED.finditer(block)]
        for start, end in zip([0, *ends], [*ends, len(block)], strict=True):
            if measured(block[start:end]):
                found.append(block[start:end])
    return found


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


def measured(claim: str) -> list[tuple[float, int]]:
    """The numbers of a text that a page must hold; small whole numbers count things, and versions
    are no measurements.
    """
    plain = re.sub(r"\]\([^)]*\)|`[^`]*`|PyTorch [\d.]+", " ", claim)
    return [
        (value, decimals)
        for value, decimals in values(plain)
        if not (value == int(value) and value < 32 and decimals == 0)
    ]


def unknown(claim: str, pages: str) -> list[float]:
    """Numbers of a claim that are on none of its pages, to the claim's decimals."""
    known = [value for value, _ in values(pages)]
    known += [1024 * int(thousands) for thousands in re.findall(r"\b(\d+)k\b", pages)]
    return [
        value
        for value, decimals in measured(claim)
        if not any(round(k, decimals) == value for k in known)
    ]


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim[:40].strip("-|* \n"))
def test_numbers_stand_on_the_pages_that_are_linked(claim: str) -> None:
    pages = [ROOT / link for link in LINK.findall(claim)]
    assert pages, f"no page of benchmarks/results is linked after these numbers: {claim}"
    text = "\n".join(
        path.read_text()
        for page in pages
        for path in (page, page.with_suffix(".json"))
        if path.is_file()
    )
    assert not unknown(claim, text), f"on none of {[page.name for page in pages]}"


def test_a_number_that_was_not_measured_is_seen() -> None:
    page = "| tokens/s | 3,819 | 2,667 | 1.43x | 86.94 GiB | 2.31e-05 |"
    assert not unknown("3,819 (1.43x of 2,667), 86.9 GiB, 2.3e-5, 4 of 28 layers", page)
    assert unknown("3,820 (1.44x) and 86.8 GiB, 2.4e-5", page) == [3820.0, 1.44, 86.8, 2.4e-05]


def test_pages_that_are_linked_name_their_commands() -> None:
    text = (ROOT / "README.md").read_text()
    links = set(LINK.findall(text[text.index("\n## Measured\n") :]))
    for link in (link for link in links if link.endswith(".md")):
        assert re.search(r"benchmarks/\w+\.py|\bpytest\b", (ROOT / link).read_text()), link
