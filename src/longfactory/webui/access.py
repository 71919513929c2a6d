"""Who may ask: the names by which the server is called, pages of other sites, the token, and how
much may be sent.

A browser sends requests on behalf of any page that is open in it. What such a page cannot forge are
the headers Host, Origin and Sec-Fetch-Site, and it cannot read or set our cookie.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

MOST_BYTES = 1 << 20
"""Of a request's body."""
SHORTEST_TOKEN = 16
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer. Nothing is loaded from elsewhere, run inline, or shown inside another page."""


def is_loopback(host: str) -> bool:
    """Whether a server that listens at `host` is reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_names(host: str, more: Iterable[str] = ()) -> frozenset[str]:
    """Names by which the server may be called, in lower case. Addresses are not listed: see
    `Access.is_called_right`.

    Args:
        host: where it listens.
        more: names that its user has allowed.
    """
    names = {"localhost", *(name.lower() for name in more)}
    if not is_loopback(host):
        names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


class Access:
    """Lets requests through to `app`, or refuses them; adds `HEADERS` to every answer. An ASGI
    application.

    Args:
        app: the application behind it.
        names: from `own_names`.
        loopback: the server listens on this machine alone.
        token: what everybody must show, in a cookie, as `?token=` of the page, or as
            `Authorization: Bearer`; None where no token is asked for.
        port: in the cookie's name, since browsers keep one jar for all ports of a host.
    """

    def __init__(
        self, app: Any, names: frozenset[str], loopback: bool, token: str | None, port: int
    ):
        self.app, self.names, self.loopback, self.token = app, names, loopback, token
        self.cookie = f"longfactory_webui_{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nothing here speaks over web sockets

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [
                    *message["headers"],
                    *((k, v) for k, v in more if k not in given),
                ]
            await send(message)

        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self.refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await _answer(send_with_headers, *refusal)
            return
        if self.token is not None and not self._shows_token(headers):
            location = self._entered(scope)
            if location is None:
                await _answer(send_with_headers, 401, NEEDS_TOKEN)
                return
            cookie = f"{self.cookie}={_digest(self.token)}; Path=/; HttpOnly; SameSite=Strict"
            await _answer(
                send_with_headers, 303, "", [("location", location), ("set-cookie", cookie)]
            )
            return
        await self.app(scope, receive, send_with_headers)

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, sentence) of a request that is refused whoever sends it; else None."""
        host = headers.get("host", "")
        if not self.is_called_right(host):
            return 421, (
                f"This server is not called {_name(host) or 'by no name'}. Open it by the address"
                " that it printed, or start it with --allow_host NAME."
            )
        opens_page = method == "GET" and path == "/"
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and not opens_page:
            return 403, "Requests from pages of other sites are refused."
        origin = headers.get("origin")
        if origin is not None and not _is_same(origin, host):
            return 403, "Requests from pages of other sites are refused."
        if method in ("GET", "HEAD"):
            return None
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "Content-Type: expected application/json."
        length = headers.get("content-length", "")
        if not length.isdigit() or "transfer-encoding" in headers:
            return 411, "Content-Length: expected the number of bytes."
        if int(length) > MOST_BYTES:
            return 413, f"Got {length} bytes, expected at most {MOST_BYTES}."
        return None

    def is_called_right(self, host: str) -> bool:
        """Whether the header Host names this server. A page that makes its own name mean our
        address (DNS rebinding) is told by that name; an address cannot be made to mean another.
        """
        name = _name(host)
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback

    def _shows_token(self, headers: dict[str, str]) -> bool:
        assert self.token is not None
        shown = headers.get("authorization", "")
        if shown.startswith("Bearer ") and _same(shown.removeprefix("Bearer "), self.token):
            return True
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load(headers.get("cookie", ""))
        except CookieError:
            return False
        return self.cookie in jar and _same(jar[self.cookie].value, _digest(self.token))

    def _entered(self, scope: Any) -> str | None:
        """Where to go on from a page that was opened with the right `?token=`; else None."""
        if scope["method"] != "GET" or scope["path"] != "/":
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        shown = next((value for name, value in query if name == "token"), "")
        if self.token is None or not _same(shown, self.token):
            return None
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        return f"/?{rest}" if rest else "/"


NEEDS_TOKEN = (
    "This page needs its token: open the address that `longfactory webui` printed, which ends in"
    " ?token=..."
)


async def _answer(
    send: Any, status: int, text: str, headers: Iterable[tuple[str, str]] = ()
) -> None:
    body = text.encode()
    fields = [
        ("content-type", "text/plain; charset=utf-8"),
        ("content-length", str(len(body))),
        *headers,
    ]
    start = {"type": "http.response.start", "status": status}
    start["headers"] = [(name.encode(), value.encode()) for name, value in fields]
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of this origin is ours: it has the name and port by which we were called."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _same(shown: str, expected: str) -> bool:
    """Compares in a time that does not depend on where they differ."""
    return secrets.compare_digest(shown.encode(), expected.encode())


def _digest(token: str) -> str:
    """What the cookie holds: enough to come in again, and not the token itself."""
    return hashlib.sha256(f"longfactory webui {token}".encode()).hexdigest()
