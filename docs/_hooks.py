"""For mkdocs: pages link to files of the repository that are no pages (results, code). On the site
such a link is the file's path; a path that is not there ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """The page's text with paths in place of links that leave docs/."""

    def path(match: re.Match[str]) -> str:
        words, target = match.groups()
        if not (ROOT / target).exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links to ../{target}, which is not there."
            )
        name = words.strip("`")
        shown = words if name == target or name in target else f"{words} "
        return f"`{target}`" if shown == words else f"{shown}(`{target}`)"

    return OUTSIDE.sub(path, markdown)
