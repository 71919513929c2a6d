"""The report as JSON and as a page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from longfactory import cli
from longfactory.data.samples import DecodedDocument, DecodedSample, Part
from longfactory.errors import UserError
from longfactory.train.verify.page import as_html, as_json, by_layer, clipped, seen_by
from longfactory.train.verify.report import (
    Cause,
    Check,
    Deviation,
    RowShape,
    TokenDistances,
    VerifyReport,
    measured,
)

ROW = RowShape(
    14,
    3,
    2,
    2,
    ((0, 6, -1, "prompt", 0), (6, 9, 0, "chosen", 0), (9, 14, 0, "rejected", 0)),
    (((0, 4), (12, 16)), ((4, 12),)),
)


def report(**changes: Any) -> VerifyReport:
    good, bad = measured(1.0, 1.0, 1e-6, 1e-6), measured(1.0, 1.0, 0.5, 1e-6)
    text = '<script>alert("x")</script>'
    sample = DecodedSample(
        "first", 0, 9, 3, (DecodedDocument("text", (Part(text, False), Part("a & b", True))),)
    )
    given: dict[str, Any] = {
        "rows": (ROW,),
        "loss": good,
        "grad_norm": Deviation(math.nan, 1.0, math.nan, 0.0, 1e-4),
        "logps": good,
        "parameters": {"model.layers.1.mlp.up_proj.weight": bad, "lm_head.weight": good},
        "reasons": ("Documents <see> each other.",),
        "notes": ("A note.",),
        "dtype": torch.bfloat16,
        "title": "a model",
        "checks": (Check("rows", "passed", "fine"), Check("window 4096", "not exercised", "short")),
        "causes": (Cause("packing", True), Cause("LoRA", None, "too large")),
        "samples": (sample,),
        "tokens": (TokenDistances(0, 1, (3, 4, 5), (0.0, 1e-3, math.nan)),),
        "windows": (4,),
    }
    return VerifyReport(**{**given, **changes})


class Balanced(HTMLParser):
    """Fails where elements are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.used: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.used += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.used += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_all_and_needs_no_other_file() -> None:
    page = as_html(report())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not {"src", "href", "onload"} & {name for name, _ in parser.used}
    assert "http" not in page and "@import" not in page and "<script" not in page
    for text in (
        "&lt;script&gt;alert",
        '<span class="trained">a &amp; b</span>',
        "Documents &lt;see&gt; each other.",
        "not exercised",
        "The difference follows packing: it is gone without it.",
        "not compared (too large)",
        "rank&nbsp;1",
        "layer 1",
        "NOT the same.",
    ):
        assert text in page, text
    assert page.count("<svg") == 3
    empty = report(rows=(), parameters={}, tokens=(), samples=(), checks=(), causes=(), windows=())
    Balanced().feed(as_html(empty))


def test_the_json_reads_back_and_has_no_numbers_that_are_none() -> None:
    found = json.loads(as_json(report()), parse_constant=pytest.fail)
    assert found["exact"] is False and found["dtype"] == "bfloat16"
    assert found["grad_norm"]["difference"] is None
    assert found["rows"][0]["ranks"] == [[[0, 4], [12, 16]], [[4, 12]]]
    assert found["checks"][1] == {
        "name": "window 4096",
        "state": "not exercised",
        "words": "short",
    }
    assert found["conclusion"].startswith("The difference follows packing")
    fields = {field.name for field in dataclasses.fields(VerifyReport)}
    assert fields < set(found)


def area(polygon: list[tuple[float, float]]) -> float:
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2  # fmt: skip


def test_a_mask_shows_parents_and_windows() -> None:
    assert [area(p) for p in seen_by(ROW, 0, None)] == [18.0]
    # A branch of 3 tokens sees its own triangle and the whole prompt of 6.
    assert sorted(area(p) for p in seen_by(ROW, 1, None)) == [4.5, 18.0]
    assert [area(p) for p in seen_by(ROW, 0, 4)] == [18.0 - 2.0]
    own, parent = seen_by(ROW, 2, 4)
    assert area(own) == 12.5 - 0.5 and area(parent) == 8.0  # the prompt's end, for 4 tokens
    assert clipped([(0, 0), (1, 0), (1, 1)], lambda point: point[0] - 2) == []


def test_distances_by_layer_are_in_their_order() -> None:
    off = measured(1.0, 1.0, 2e-4, 0.0)
    shares = by_layer({f"model.layers.{i}.mlp.weight": off for i in (10, 2)} | {"norm.weight": off})
    assert list(shares) == ["layer 2", "layer 10", "norm"]
    assert all(re.fullmatch(r"2\.0+", f"{share:.6f}") for share in shares.values())


@pytest.mark.parametrize("words", [["--json"], ["--html", "/nowhere/at/all/report.html"]])
def test_a_file_that_cannot_be_is_told_before_the_run(words: list[str]) -> None:
    with pytest.raises(UserError, match="in a folder that exists"):
        cli.verify(["run.yaml", *words])
