"""`longfactory webui`: reads the words of the command, opens the port, serves."""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from longfactory import resources
from longfactory.errors import UserError
from longfactory.webui.access import SHORTEST_TOKEN, Access, is_loopback, own_names
from longfactory.webui.folders import Folders

TOKEN = "LONGFACTORY_WEBUI_TOKEN"
PORT = 7860


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longfactory webui",
        description="A page to compose, start, follow and compare runs (docs/webui.md).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1, this machine only); with any other "
        f"address visitors need a token: that of the variable {TOKEN}, else a new one",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"port (default {PORT}; 0: any)")
    parser.add_argument(
        "--folder",
        action="append",
        metavar="FOLDER",
        help="a folder that the page may read and write; may be given several times (default: "
        "the current folder)",
    )
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which browsers reach the server, as behind a proxy",
    )
    parser.add_argument(
        "--allow_code",
        action="store_true",
        help="start runs with trust_remote_code or loss_path, which execute code that is not"
        " LongFactory's",
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write the board of all runs in the folders into one HTML file, and stop",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Serves until Ctrl-C. Returns the exit status.

    Raises:
        UserError: a folder, a port or a token that cannot be used, or packages that are missing.
    """
    a = make_parser().parse_args(list(argv))
    folders = Folders(a.folder or [os.getcwd()])
    if a.export is not None:
        return export(folders, Path(a.export))
    missing = [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f'webui: {" and ".join(missing)} not installed. Run: pip install "longfactory[webui]"'
        )
    token = token_for(a.host, os.environ.get(TOKEN))
    port = listen(a.host, a.port)
    try:
        serve(a, folders, token, port)
    finally:
        port.close()
    return 0


def export(folders: Folders, target: Path) -> int:
    """Writes the board of every run into a file."""
    from longfactory.webui.board import as_html
    from longfactory.webui.runs import Board

    board = Board(folders)
    found = board.find()
    if not found:
        raise UserError(
            "--export: no run was found (a folder with a trainer_log.jsonl) in"
            f" {', '.join(map(str, folders.roots))}. Name others with --folder."
        )
    if not target.absolute().parent.is_dir():
        raise UserError(f"--export {target}: there is no folder {target.parent}.")
    target.write_text(as_html(board, found), encoding="utf-8")
    print(f"{target} is written: {len(found)} runs.")
    return 0


def token_for(host: str, given: str | None) -> str | None:
    """The token that everybody must show; None where the server is reached from this machine alone
    and none was given.

    Raises:
        UserError: the one that was given is too short.
    """
    if given:
        if len(given) < SHORTEST_TOKEN:
            raise UserError(
                f"{TOKEN}: got {len(given)} characters, expected at least {SHORTEST_TOKEN}."
            )
        return given
    return None if is_loopback(host) else secrets.token_urlsafe(32)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is not of this machine, or the port is in use.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port: got {port}, expected 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise UserError(
            f"{host}:{port} cannot be opened ({error.strerror or error}). Choose another one with"
            " --port or --host; --port 0 takes any that is free."
        ) from error
    return opened


def serve(a: argparse.Namespace, folders: Folders, token: str | None, port: socket.socket) -> None:
    """Serves until a signal asks for the end. Runs that were started go on."""
    import uvicorn

    from longfactory.webui.server import Page, make_app

    number = port.getsockname()[1]
    page = Page(folders, a.allow_code, resources.folder("examples"))
    app = Access(
        make_app(page), own_names(a.host, a.allow_host), is_loopback(a.host), token, number
    )
    name = f"[{a.host}]" if ":" in a.host else a.host
    shown = socket.gethostname() if a.host in ("0.0.0.0", "::") else name
    query = "" if token is None else f"/?token={token}"
    print(f"The page: http://{shown}:{number}{query}")
    print(f"Folders that it reads and writes: {', '.join(map(str, folders.roots))}")
    if not is_loopback(a.host):
        print(
            "Its traffic is not encrypted: on a network that you do not trust, listen at 127.0.0.1"
            " and reach it through ssh -L."
        )
    sys.stdout.flush()
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    # uvicorn ends at either signal and sends it again, to whoever listened before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(settings).run(sockets=[port])
    running = [job.name for job in page.jobs.all() if job.ended is None]
    if running:
        print(f"The page is closed. {len(running)} runs continue: {', '.join(running)}.")
