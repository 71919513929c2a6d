"""The page's server in a thread of the test, asked over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from longfactory.webui.access import Access, is_loopback, own_names
from longfactory.webui.command import listen
from longfactory.webui.folders import Folders
from longfactory.webui.server import Page, make_app


@dataclass
class Served:
    """A server that listens. `page` is what its routes share."""

    port: int
    page: Page

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, sent: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers) of a request: POST where something is sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = dict(headers or {})
        body = None
        if sent is not None:
            body = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            given.setdefault("Content-Type", "application/json")
        connection.request("GET" if sent is None else "POST", path, body, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        found = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text, found


@contextlib.contextmanager
def served(
    *folders: Path, token: str | None = None, host: str = "127.0.0.1", **options: Any
) -> Iterator[Served]:
    """A server for these folders, as `longfactory webui` makes it."""
    page = Page(Folders(folders), **options)
    opened = listen(host, 0)
    port = opened.getsockname()[1]
    app = Access(make_app(page), own_names(host), is_loopback(host), token, port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(port, page)
    finally:
        server.should_exit = True
        thread.join(10)
        opened.close()
