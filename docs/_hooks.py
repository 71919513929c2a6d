"""For mkdocs. Pages link to files of the repository that are no pages (results, code): on the site
such a link is the file's path, and one to a path that is not there is a warning, which ends a
strict build. Pages that the navigation of mkdocs.yml leaves out come at the end of its reference.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
log = logging.getLogger("mkdocs.hooks.repository")


def on_config(config: Any, **kwargs: Any) -> Any:
    """Adds what the navigation leaves out."""
    named = set(re.findall(r"[\w./]+\.md", str(config.nav)))
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    for page in sorted(DOCS.glob("*.md")):
        if page.name not in named:
            title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            reference.append({title: page.name})
    return config


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """The page's text with paths in place of links that leave docs/."""

    def path(match: re.Match[str]) -> str:
        words, target = match.groups()
        if not (DOCS.parent / target).exists():
            log.warning("%s links to ../%s, which is not there.", page.file.src_uri, target)
        in_path = words.strip("`") in target
        return f"`{target}`" if in_path else f"{words} (`{target}`)"

    return OUTSIDE.sub(path, markdown)
