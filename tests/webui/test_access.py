"""Who may ask: other names (DNS rebinding), pages of other sites, the token, what is too long."""

from __future__ import annotations

import http.client
import secrets
import socket
from pathlib import Path
from typing import Any

import pytest

from longfactory.errors import UserError
from longfactory.webui import access, command
from longfactory.webui.access import Access, is_loopback, own_names
from served_page import served

TOKEN = "a token of enough characters"


def behind(loopback: bool = True) -> Access:
    host = "127.0.0.1" if loopback else "0.0.0.0"
    return Access(None, own_names(host, ["proxy.example"]), loopback, None, 7860)


@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("127.0.0.1:7860", True),
        ("localhost:1234", True),
        ("[::1]:7860", True),
        ("Proxy.example", True),
        ("evil.example:7860", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.0.7:7860", False),
        ("", False),
        ("[", False),
    ],
)
def test_names_by_which_the_server_is_called(host: str, right: bool) -> None:
    assert behind().is_called_right(host) is right
    refused = behind().refusal("GET", "/", {"host": host})
    assert (refused is None) is right
    if refused is not None:
        assert refused[0] == 421


def test_a_server_for_other_machines_is_called_by_its_names_and_by_any_address() -> None:
    outside = behind(loopback=False)
    assert outside.is_called_right("192.168.0.7:7860")
    assert outside.is_called_right(socket.gethostname())
    assert not outside.is_called_right("evil.example")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://localhost:7860"},
        {"origin": "null"},
        {"origin": "file://"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_sites_are_refused(headers: dict[str, str], method: str) -> None:
    own = {"host": "127.0.0.1:7860", "content-type": "application/json", "content-length": "2"}
    assert behind().refusal(method, "/api/jobs", own) is None
    refused = behind().refusal(method, "/api/jobs", {**own, **headers})
    assert refused is not None and refused[0] == 403


def test_our_own_page_may_ask_and_a_link_may_open_it() -> None:
    own = {
        "host": "127.0.0.1:7860",
        "origin": "http://127.0.0.1:7860",
        "sec-fetch-site": "same-origin",
        "content-type": "application/json; charset=utf-8",
        "content-length": "2",
    }
    assert behind().refusal("POST", "/api/jobs", own) is None
    link = {"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}
    assert behind().refusal("GET", "/", link) is None
    assert behind().refusal("GET", "/api/jobs", link) is not None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-length": ""}, 411),
        ({"transfer-encoding": "chunked"}, 411),
        ({"content-length": str(access.MOST_BYTES + 1)}, 413),
    ],
)
def test_what_forms_of_other_pages_send_and_what_is_too_long(
    headers: dict[str, str], status: int
) -> None:
    own = {"host": "localhost", "content-type": "application/json", "content-length": "2"}
    refused = behind().refusal("POST", "/api/jobs", {**own, **headers})
    assert refused is not None and refused[0] == status


def test_over_http_refusals_and_headers(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        status, _, headers = server.ask("/")
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers
        assert server.ask("/api/about", headers={"Host": "evil.example"})[0] == 421
        assert server.ask("/api/about", headers={"Origin": "http://evil.example"})[0] == 403
        evil = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
        start = {"command": "train", "yaml": "stage: sft"}
        assert server.ask("/api/jobs", start, evil)[0] == 403
        assert server.page.jobs.all() == []


def test_a_body_without_a_length_is_not_read(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/api/check", iter([b"{}"]), headers, encode_chunked=True)
        assert connection.getresponse().status == 411


def test_the_token_is_asked_for_everywhere(tmp_path: Path) -> None:
    with served(tmp_path, token=TOKEN) as server:
        for path in ("/", "/api/about", "/api/jobs", "/static/app.js", "/api/runs"):
            status, text, _ = server.ask(path)
            assert status == 401 and "?token=" in text
        assert server.ask("/?token=another")[0] == 401
        assert server.ask("/api/about?token=" + TOKEN.replace(" ", "+"))[0] == 401
        status, _, headers = server.ask("/?token=" + TOKEN.replace(" ", "%20") + "&tab=runs")
        assert status == 303 and headers["location"] == "/?tab=runs"
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        shown = {"Cookie": cookie.split(";")[0]}
        assert server.ask("/api/about", headers=shown)[0] == 200
        assert server.ask("/api/about", headers={"Cookie": shown["Cookie"][:-1] + "x"})[0] == 401
        assert server.ask("/api/about", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        assert server.ask("/api/about", headers={"Authorization": "Bearer x"})[0] == 401
        # Of another site it is refused even with the cookie.
        assert server.ask("/api/about", headers={**shown, "Origin": "http://e.example"})[0] == 403


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = secrets.compare_digest

    def compare(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(secrets, "compare_digest", compare)
    asked = Access(None, own_names("127.0.0.1"), True, TOKEN, 7860)
    assert not asked._shows_token({"authorization": "Bearer wrong"})
    assert asked._shows_token({"cookie": f"{asked.cookie}={access._digest(TOKEN)}"})
    assert not asked._shows_token({"cookie": "=;;\x01"})
    assert len(compared) == 2


def test_another_address_than_this_machine_has_a_token() -> None:
    assert command.token_for("127.0.0.1", None) is None
    assert command.token_for("::1", None) is None and command.token_for("localhost", None) is None
    first, second = command.token_for("0.0.0.0", None), command.token_for("0.0.0.0", None)
    assert first is not None and len(first) >= 43 and first != second
    assert command.token_for("192.168.0.7", TOKEN) == TOKEN
    assert command.token_for("127.0.0.1", TOKEN) == TOKEN
    with pytest.raises(UserError, match="got 5 characters, expected at least 16"):
        command.token_for("0.0.0.0", "short")
    assert not is_loopback("example.com")


def test_ports_and_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be opened"):
            command.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="expected 0 to 65535"):
        command.listen("127.0.0.1", 70000)
    with pytest.raises(UserError, match="no such folder"):
        command.main(["--folder", str(tmp_path / "missing")])
