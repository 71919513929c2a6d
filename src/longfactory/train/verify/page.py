"""The report of `longfactory verify` as JSON, and as one HTML page whose pictures are inline
SVG: no other file is needed to read it.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from longfactory.data.samples import DecodedSample
from longfactory.train.verify.report import (
    Cause,
    Deviation,
    RowShape,
    TokenDistances,
    VerifyReport,
    conclusion,
    outcome,
)

SIDE, STRIP = 360, 12
"""Pixels: a mask, and the strip that tells its ranks."""
WIDTH = 720
RANKS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
SEEN = ("#7f9fbf", "#a3b8cc")
"""What a document sees, of neighbours in turn."""
RIGHT, WRONG, PALE = "#2f7d4f", "#b3261e", "#c9d6e2"
DOCUMENTS = 24
"""Of which token distances are drawn."""
CHARACTERS = 20_000
"""Of a sample that are shown at its head, and as many at its tail."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em;
  color: #1c1c1c; background: #fff; }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left;
  vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f4; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 40em; overflow-y: auto }
.passed { color: #2f7d4f } .failed { color: #b3261e; font-weight: bold } .not { color: #8a6100 }
.trained { background: #cdebd6; color: #0b4a24 } .cut { color: #8a6100 }
figure { display: inline-block; margin: 0 1.5em 1em 0; vertical-align: top }
figcaption { font-size: .9em; max-width: 390px }
"""


def as_json(report: VerifyReport) -> str:
    """The report as JSON; what is no number is null."""
    fields = dataclasses.asdict(report)
    fields["dtype"] = str(report.dtype).rsplit(".", 1)[-1]
    summary = {
        "exact": report.exact,
        "conclusion": conclusion(report.causes) if report.causes else None,
    }
    return json.dumps(_plain({**summary, **fields}), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(x: Any) -> Any:
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return x


# -- the page --------------------------------------------------------------------------------------


def as_html(report: VerifyReport) -> str:
    """The report as one page."""
    verdict = "passed" if report.exact else "failed"
    told = "The same." if report.exact else "NOT the same."
    parts = [
        f"<h1>longfactory verify</h1><p>{_text(report.title)}</p>",
        f'<p class="{verdict}">{told}</p>',
        *(f"<p>{_text(reason)}</p>" for reason in report.reasons),
        *_causes(report.causes),
        "<h2>Numbers</h2>",
        _numbers(report),
        "<h2>Checks</h2>",
        _checks(report),
        *(f"<p>{_text(note)}</p>" for note in report.notes),
        "<h2>Rows: who sees whom, and which rank holds what</h2>",
        *(mask_figure(i + 1, row, report.windows) for i, row in enumerate(report.rows)),
        "<h2>Gradients, layer by layer</h2>",
        layer_bars(report.parameters),
        "<h2>Log-probabilities, token by token</h2>",
        *(token_figure(each, report.logps.allowed) for each in report.tokens[:DOCUMENTS]),
        _left_out(len(report.tokens) - DOCUMENTS, "documents"),
        "<h2>Training data</h2>",
        *(_sample(sample) for sample in report.samples),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>longfactory verify</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _text(x: object) -> str:
    return html.escape(str(x))


def _left_out(count: int, what: str) -> str:
    return f'<p class="cut">{count} more {what}.</p>' if count > 0 else ""


def _causes(causes: Sequence[Cause]) -> Iterator[str]:
    if not causes:
        return
    yield f"<p><b>{_text(conclusion(causes))}</b></p><ul>"
    for cause in causes:
        yield f"<li>without {_text(cause.left_out)}: {_text(outcome(cause))}</li>"
    yield "</ul>"


def _numbers(report: VerifyReport) -> str:
    lines = [
        "<table><tr><th></th><th class=n>split</th><th class=n>alone</th>"
        "<th class=n>difference</th><th class=n>own</th><th class=n>allowed</th></tr>"
    ]
    named = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "log-probabilities": report.logps,
        **dict(list(report.parameters.items())[:8]),
    }
    for name, m in named.items():
        cells = (f"{m.split:.7g}", f"{m.alone:.7g}", *(f"{x:.1e}" for x in _differences(m)))
        state = "passed" if m.exact else "failed"
        numbers = "".join(f"<td class=n>{_text(cell)}</td>" for cell in cells)
        lines.append(f'<tr><td class="{state}">{_text(name)}</td>{numbers}</tr>')
    left_out = _left_out(len(report.parameters) - 8, "parameters, all of them nearer")
    return "".join(lines) + "</table>" + left_out


def _differences(m: Deviation) -> tuple[float, float, float]:
    return m.difference, m.own, m.allowed


def _checks(report: VerifyReport) -> str:
    lines = ["<table>"]
    for check in report.checks:
        state = check.state.split()[0]
        lines.append(
            f'<tr><td class="{state}">{_text(check.state)}</td><td>{_text(check.name)}</td>'
            f"<td>{_text(check.words)}</td></tr>"
        )
    return "".join(lines) + "</table>"


# -- the mask of a row -----------------------------------------------------------------------------

Point = tuple[float, float]
"""(key, query), in tokens of the row."""


def clipped(polygon: Sequence[Point], inside: Callable[[Point], float]) -> list[Point]:
    """The part of a convex polygon where a linear function is not negative."""
    out: list[Point] = []
    for i, b in enumerate(polygon):
        a = polygon[i - 1]
        fa, fb = inside(a), inside(b)
        if (fa < 0) != (fb < 0):
            t = fa / (fa - fb)
            out.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        if fb >= 0:
            out.append(b)
    return out


def seen_by(row: RowShape, number: int, window: int | None) -> list[list[Point]]:
    """What the tokens of a document see: polygons, its own first, then those of its parents."""
    chain, offset = [number], 0
    while row.placed[chain[-1]][2] >= 0:
        chain.append(row.placed[chain[-1]][2])
    lengths = {i: row.placed[i][1] - row.placed[i][0] for i in chain}
    a, b = row.placed[number][:2]
    out: list[list[Point]] = []
    for i in chain:
        start, stop = row.placed[i][:2]
        # The first token of `number` comes so many tokens after the first of document i.
        offset += lengths[i] if i != number else 0
        if i == number:
            polygon: list[Point] = [(a, a), (b, b), (a, b)]
        else:
            polygon = [(start, a), (stop, a), (stop, b), (start, b)]
        if window is not None:

            def near(point: Point, start: int = start, offset: int = offset) -> float:
                return window - (offset + point[1] - a - (point[0] - start))

            polygon = clipped(polygon, near)
        if len(polygon) > 2:
            out.append(polygon)
    return out


def mask_figure(number: int, row: RowShape, windows: Sequence[int]) -> str:
    """A row's mask, keys to the right and queries down, with the borders of ranks."""
    length = row.tokens + row.padding
    if not length:
        return ""
    scale = SIDE / length
    window = min(windows) if windows else None
    shapes = []
    for i in range(len(row.placed)):
        for polygon in seen_by(row, i, window):
            points = " ".join(f"{k * scale:.1f},{q * scale:.1f}" for k, q in polygon)
            shapes.append(f'<polygon points="{points}" fill="{SEEN[i % 2]}"/>')
    for rank, intervals in enumerate(row.ranks):
        colour = RANKS[rank % len(RANKS)]
        for start, stop in intervals:
            at, size = start * scale, max((stop - start) * scale, 0.5)
            shapes.append(
                f'<rect x="{at:.1f}" y="{-STRIP}" width="{size:.1f}" height="{STRIP - 2}"'
                f' fill="{colour}"/><rect y="{at:.1f}" x="{-STRIP}" height="{size:.1f}"'
                f' width="{STRIP - 2}" fill="{colour}"/>'
            )
            if start and len(row.ranks) > 1:
                shapes.append(
                    f'<path d="M{at:.1f},0V{SIDE}M0,{at:.1f}H{SIDE}" stroke="#333"'
                    ' stroke-dasharray="3 3" stroke-width=".6"/>'
                )
    legend = " ".join(
        f'<span style="color:{RANKS[rank % len(RANKS)]}">&#9632;</span>&nbsp;rank&nbsp;{rank}'
        for rank in range(len(row.ranks))
    )
    hidden = f", window {window}" if window is not None else ""
    frame = f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#999"/>'
    box = f"{-STRIP} {-STRIP} {SIDE + STRIP + 1} {SIDE + STRIP + 1}"
    return (
        f'<figure><svg viewBox="{box}" width="{SIDE + STRIP}" height="{SIDE + STRIP}" role="img">'
        f"{''.join(shapes)}{frame}</svg><figcaption>Row {number}: {row.tokens} tokens,"
        f" {row.documents} documents, {row.crossing} of them on several ranks, {row.padding} of"
        f" padding{hidden}. Keys to the right, queries down. {legend}</figcaption></figure>"
    )


# -- bars ------------------------------------------------------------------------------------------


def by_layer(parameters: dict[str, Deviation]) -> dict[str, float]:
    """Of each layer (or part outside of layers) the largest share of what is allowed."""
    found: dict[str, float] = {}
    for name, m in parameters.items():
        match = re.search(r"(?:layers|h|blocks)\.(\d+)\.", name)
        part = f"layer {int(match[1])}" if match else name.removesuffix(".weight")
        share = m.difference / max(m.allowed, 1e-30)
        found[part] = max(found.get(part, 0.0), math.inf if math.isnan(share) else share)

    def order(part: str) -> tuple[int, int]:
        return (0, int(part.split()[1])) if part.startswith("layer ") else (1, 0)

    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def layer_bars(parameters: dict[str, Deviation]) -> str:
    """The largest difference of a gradient in each layer, over what is allowed."""
    shares = by_layer(parameters)
    height, left, lowest, highest = 16, 190, -5.0, 4.0

    def place(share: float) -> float:
        log = math.log10(min(max(share, 1e-30), 1e30))
        return (min(max(log, lowest), highest) - lowest) / (highest - lowest) * (WIDTH - left - 90)

    lines = []
    for i, (part, share) in enumerate(shares.items()):
        y, colour = i * height, RIGHT if share <= 1 else WRONG
        lines.append(
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{_text(part[-30:])}</text>'
            f'<rect x="{left}" y="{y + 2}" width="{place(share):.1f}" height="{height - 4}"'
            f' fill="{colour}"/><text x="{left + place(share) + 4:.1f}" y="{y + 12}">{share:.1e}'
            "</text>"
        )
    tall = len(shares) * height
    limit = left + place(1.0)
    lines.append(f'<path d="M{limit:.1f},0V{tall}" stroke="#333" stroke-dasharray="3 3"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" font-size="11"'
        f' role="img">{"".join(lines)}</svg><p>The largest difference of a gradient over what is'
        " allowed, on a logarithmic scale; the dashed line is 1.</p>"
    )


def token_figure(found: TokenDistances, allowed: float) -> str:
    """Distances of a document's tokens, on a logarithmic scale from 1e-9 to 10."""
    height, count = 48, len(found.distances)
    if not count:
        return ""

    def place(x: float) -> float:
        log = math.log10(max(x, 1e-9)) if x == x else 1.0
        return (min(log, 1.0) + 9.0) / 10.0 * height

    bins = min(count, WIDTH)
    bars = []
    for i in range(bins):
        some = found.distances[i * count // bins : (i + 1) * count // bins]
        largest = max((math.inf if x != x else x) for x in some)
        tall, wide = place(largest), WIDTH / bins
        colour = WRONG if largest > 2 * allowed else PALE
        bars.append(
            f'<rect x="{i * wide:.1f}" y="{height - tall:.1f}" width="{wide:.2f}"'
            f' height="{tall:.1f}" fill="{colour}"/>'
        )
    limit = height - place(2 * allowed)
    return (
        f"<p>Row {found.row + 1}, document {found.document + 1}: {count} tokens, from token"
        f" {found.places[0] + 1} on</p>"
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f"{''.join(bars)}"
        f'<path d="M0,{limit:.1f}H{WIDTH}" stroke="#333" stroke-dasharray="3 3"/></svg>'
    )


# -- the data --------------------------------------------------------------------------------------


def _sample(sample: DecodedSample) -> str:
    documents = []
    for i, document in enumerate(sample.documents):
        pairs = [(part.text, part.trained) for part in document.parts]
        total = sum(len(text) for text, _ in pairs)
        head = "".join(_spans(pairs, 0, CHARACTERS))
        if total > 2 * CHARACTERS:
            cut = f'<span class="cut"> ... {total - 2 * CHARACTERS} characters ... </span>'
            head += cut + "".join(_spans(pairs, total - CHARACTERS, total))
        elif total > CHARACTERS:
            head += "".join(_spans(pairs, CHARACTERS, total))
        role = f"{i + 1} {_text(document.role)}: " if len(sample.documents) > 1 else ""
        documents.append(f"<pre>{role}{head}</pre>")
    return (
        f"<p>Sample {sample.number} ({sample.which}): {sample.trained} of {sample.tokens} tokens"
        ' are trained, <span class="trained">like this</span>.</p>' + "".join(documents)
    )


def _spans(pairs: Sequence[tuple[str, bool]], first: int, last: int) -> Iterator[str]:
    """The characters [first, last) of parts of text."""
    at = 0
    for text, trained in pairs:
        some = text[max(first - at, 0) : max(last - at, 0)]
        at += len(text)
        if some:
            yield f'<span class="trained">{_text(some)}</span>' if trained else _text(some)
