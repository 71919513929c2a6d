"""The board as one HTML file that needs no other: what the page shows of runs, as they are now."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfactory.webui.runs import Board, differences

STATIC = Path(__file__).parent / "static"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs side by side, as the page's script takes them."""
    return {"runs": runs, "differences": differences(runs), "at": time.time()}


def as_html(board: Board, folders: Sequence[Path]) -> str:
    """The board of these runs, in the order given.

    The browser is told to load nothing: everything is in the file.
    """
    # Inside of <script> no text may close it, and U+2028 and U+2029 are line ends to old readers.
    content = json.dumps(compared([board.run(folder) for folder in folders]), ensure_ascii=True)
    content = content.replace("<", "\\u003c")
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    scripts = "\n".join(
        (STATIC / name).read_text(encoding="utf-8") for name in ("charts.js", "board.js")
    )
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    title = html.escape(f"LongFactory: {len(folders)} runs, {written}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style></head>\n"
        f'<body class="exported"><main><h1>{title}</h1><div id="board"></div></main>\n'
        f'<script type="application/json" id="data">{content}</script>\n'
        f"<script>\n{scripts}\n"
        "drawBoard(document.getElementById('board'),"
        " JSON.parse(document.getElementById('data').textContent));\n"
        "</script></body></html>\n"
    )
