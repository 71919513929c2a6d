"""The server's routes: HTTP in, what the other modules say out. Everything that the page shows is
kept here or on the disk, so that a page may be closed and two viewers see the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from longfactory import __version__
from longfactory.errors import UserError
from longfactory.webui import board as boards
from longfactory.webui import compose
from longfactory.webui.ask import AT_ONCE, Answer, ask, command
from longfactory.webui.chat import Chat
from longfactory.webui.folders import Folders
from longfactory.webui.jobs import Job, Jobs
from longfactory.webui.models import found_models, run_of_model
from longfactory.webui.runs import Board

DRY_RUN_SECONDS, PLAN_SECONDS, PREVIEW_SECONDS = 120.0, 180.0, 180.0
GPUS = ("H100", "H200", "A100", "B200", "L40S")


class Page:
    """What the routes share.

    Args:
        folders: that may be read and written.
        allow_code: runs may execute code that is not LongFactory's.
        recipes: the folder of the examples that come with LongFactory.
    """

    def __init__(self, folders: Folders, allow_code: bool = False, recipes: Path | None = None):
        self.folders, self.allow_code, self.recipes = folders, allow_code, recipes
        self.jobs = Jobs(folders.roots[0])
        self.board = Board(folders)
        self.chat = Chat()
        self.turn = asyncio.Semaphore(AT_ONCE)

    @contextlib.contextmanager
    def written(self, yaml: str) -> Iterator[Path]:
        """A run's YAML as a file that only this user can read, for as long as it is asked about."""
        with tempfile.TemporaryDirectory(prefix="longfactory-webui-") as folder:
            path = Path(folder) / "run.yaml"
            path.write_text(yaml, encoding="utf-8")
            yield path

    def checked(self, path: Path, kind: str) -> compose.Checked:
        """The run in a file, looked at by the page's rules."""
        if kind not in compose.COMMANDS:
            raise UserError(f"command: got {kind!r}, expected {', '.join(compose.COMMANDS)}.")
        return compose.check(path, kind, self.folders, self.allow_code)  # type: ignore[arg-type]

    def usable(self, path: Path, kind: str) -> compose.Checked:
        """The same.

        Raises:
            UserError: it cannot be run, or the page does not run it.
        """
        found = self.checked(path, kind)
        if found.cfg is None:
            raise UserError("\n".join(found.problems))
        return found

    def reports(self, folder: Path) -> list[Path]:
        """`verify`'s reports of runs that were started here and write to this folder."""
        return [
            self.jobs.report(job.name)
            for job in self.jobs.all()
            if job.command == "verify" and job.output_dir and _same(job.output_dir, folder)
        ]

    def job_as_json(self, job: Job) -> dict[str, Any]:
        """A job with how far it is."""
        row = self.board.last_row(Path(job.output_dir), job.started) if job.output_dir else {}
        return {**job.as_json(), "last": row}


Handler = Callable[[Page, Request], Awaitable[Response]]


def route(path: str, method: str, handler: Handler, page: Page) -> Route:
    """A route whose UserErrors are answers of status 400."""

    @functools.wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(page, request)
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except OSError as error:
            said = f"{error.filename or 'A file'}: {error.strerror or error}."
            return JSONResponse({"error": said}, status_code=400)

    return Route(path, endpoint, methods=[method])


async def body(request: Request) -> dict[str, Any]:
    """The object of JSON that a request sends.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError("Expected an object of JSON.")
    return found


def text_of(sent: dict[str, Any], name: str) -> str:
    """A field that is a text.

    Raises:
        UserError: it is missing, or no text.
    """
    value = sent.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name}: expected text.")
    return value


async def about(page: Page, request: Request) -> Response:
    """What the page is made of: keys, templates, folders."""
    return JSONResponse(
        {
            "version": __version__,
            "folders": [str(root) for root in page.folders.roots],
            "here": os.getcwd(),
            "allow_code": page.allow_code,
            "keys": compose.form_keys(),
            "templates": compose.template_names(),
            "gpus": GPUS,
        }
    )


async def recipes(page: Page, request: Request) -> Response:
    """Runs to begin with."""
    found = await run_in_threadpool(compose.recipes, page.folders, page.recipes)
    return JSONResponse({"recipes": found})


async def recipe(page: Page, request: Request) -> Response:
    """The text of one of them."""
    wanted = request.query_params.get("path", "")
    own = page.recipes is not None and Folders([page.recipes]).holds(wanted)
    path = Path(wanted).resolve() if own else page.folders.inside(wanted)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UserError(f"{wanted} is no YAML file.")
    if path.stat().st_size > 4 * compose.LONGEST:
        raise UserError(f"{wanted} has {path.stat().st_size} bytes: too long for a run.")
    text = path.read_text(encoding="utf-8", errors="replace")
    return JSONResponse({"yaml": compose.redacted(text)})


async def data_sets(page: Page, request: Request) -> Response:
    """Names of data sets in a folder."""
    folder = request.query_params.get("folder", "data")
    return JSONResponse({"data_sets": compose.data_sets(folder, page.folders)})


async def check(page: Page, request: Request) -> Response:
    """What the command's reader says of a run, at once."""
    sent = await body(request)

    def look() -> dict[str, Any]:
        with page.written(text_of(sent, "yaml")) as path:
            return page.checked(path, text_of(sent, "command")).as_json()

    return JSONResponse(await run_in_threadpool(look))


async def asked(
    page: Page,
    request: Request,
    seconds: float,
    words: Callable[[Path, dict[str, Any]], list[str]],
) -> Response:
    """What a process says of a run that is sent."""
    sent = await body(request)
    with page.written(text_of(sent, "yaml")) as path:
        await run_in_threadpool(page.usable, path, "train")
        answer = await ask(words(path, sent), seconds, request.is_disconnected, page.turn)
        if answer is None:
            return Response(status_code=204)
        hidden = {f"{path}": "run.yaml", f"{path.parent}/": ""}
        for what, instead in hidden.items():
            answer = Answer(
                answer.status,
                answer.output.replace(what, instead),
                answer.error.replace(what, instead),
            )
    return JSONResponse(answer.as_json())


async def dry_run(page: Page, request: Request) -> Response:
    """What `longfactory train --dry_run` notes."""
    return await asked(
        page,
        request,
        DRY_RUN_SECONDS,
        lambda path, sent: command("train", str(path), "--dry_run"),
    )


def plan_words(path: Path, sent: dict[str, Any]) -> list[str]:
    """`longfactory plan` for the machine that the form names.

    Raises:
        UserError: another number or kind than those of the form.
    """
    gpus, kind = sent.get("gpus", 8), sent.get("gpu", "H100")
    if not isinstance(gpus, int) or isinstance(gpus, bool) or not 1 <= gpus <= 4096:
        raise UserError(f"gpus: got {gpus!r}, expected a whole number from 1 to 4096.")
    if kind not in GPUS:
        raise UserError(f"gpu: got {kind!r}, expected one of {', '.join(GPUS)}.")
    return command("plan", str(path), "--gpus", f"{gpus}x{kind}")


async def plan(page: Page, request: Request) -> Response:
    """What `longfactory plan` answers."""
    return await asked(page, request, PLAN_SECONDS, plan_words)


async def preview(page: Page, request: Request) -> Response:
    """Samples of the data with what is trained of them."""

    def words(path: Path, sent: dict[str, Any]) -> list[str]:
        roots = [str(root) for root in page.folders.roots]
        return [sys.executable, "-m", "longfactory.webui.preview", str(path), *roots]

    return await asked(page, request, PREVIEW_SECONDS, words)


# -- runs ------------------------------------------------------------------------------------------


async def jobs(page: Page, request: Request) -> Response:
    """Everything that was started here."""

    def look() -> list[dict[str, Any]]:
        return [page.job_as_json(job) for job in page.jobs.all()]

    return JSONResponse({"jobs": await run_in_threadpool(look)})


RUNS = ("train", "verify", "export")
"""Commands that read a run's file alone."""


def eval_words(sent: dict[str, Any]) -> list[str]:
    """What the page says of a measurement at length: texts of which lengths, and how many.

    Raises:
        UserError: they are no numbers.
    """
    lengths, samples = str(sent.get("lengths", "")), str(sent.get("samples", ""))
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9}){0,31}", lengths):
        raise UserError("lengths: expected numbers of tokens with commas, such as 4096,16384.")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", samples):
        raise UserError("samples: expected how many texts of each kind, from 1 to 9999.")
    return [f"lengths={lengths}", f"samples={samples}"]


def expand_words(sent: dict[str, Any]) -> list[str]:
    """How many layers the page adds to a model.

    Raises:
        UserError: it is no number.
    """
    layers = str(sent.get("layers", ""))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", layers):
        raise UserError("layers: expected how many layers to add, from 1 to 9999.")
    return [f"num_expand={layers}"]


async def picture(page: Page, request: Request) -> Response:
    """What `eval` has drawn."""
    path = page.jobs.picture(job_of(page, request).name)
    if not path.is_file():
        raise UserError("There is no picture yet.")
    return FileResponse(path, media_type="image/png")


async def start(page: Page, request: Request) -> Response:
    """Starts the command on a run."""
    sent = await body(request)
    kind, yaml = text_of(sent, "command"), text_of(sent, "yaml")
    if kind not in (*RUNS, "eval", "expand"):
        raise UserError(f"command: got {kind!r}, expected {', '.join(RUNS)}, eval or expand.")
    more = {"eval": eval_words, "expand": expand_words}.get(kind, lambda sent: [])(sent)

    def begin() -> Job:
        with page.written(yaml) as path:
            found = page.usable(path, kind)
        assert found.cfg is not None
        out = found.cfg.trainer.output_dir if kind == "train" else found.values.get("output_dir")
        where = found.cfg.output.export_dir if kind in ("export", "expand") else out
        where = "" if kind == "eval" or not where else str(Path(str(where)).resolve())
        words = list(more)
        if kind == "expand":
            words += [f"model_name_or_path={found.cfg.model.model_name_or_path}"]
            words += [f"export_dir={where}"]
        return page.jobs.start(kind, yaml, where, words, file=kind != "expand")

    return JSONResponse((await run_in_threadpool(begin)).as_json())


def job_of(page: Page, request: Request) -> Job:
    """The job in a request's path.

    Raises:
        UserError: there is none of that name.
    """
    name = request.path_params["name"]
    job = page.jobs.get(name)
    if job is None:
        raise UserError(f"There is no run {name[:60]!r}.")
    return job


async def job(page: Page, request: Request) -> Response:
    """One job with the end of its console."""

    def look() -> dict[str, Any]:
        found = job_of(page, request)
        console = page.jobs.console(found.name)
        report = page.board.verify(page.jobs.home / found.name)
        more: dict[str, Any] = {"console": console, "yaml": page.jobs.yaml(found.name)}
        more |= {"verify": report, "picture": page.jobs.picture(found.name).is_file()}
        return {**page.job_as_json(found), **more}

    return JSONResponse(await run_in_threadpool(look))


async def stop(page: Page, request: Request) -> Response:
    """Asks a job to stop, or ends it."""
    sent = await body(request)
    found = job_of(page, request)
    kill = sent.get("kill") is True
    return JSONResponse((await run_in_threadpool(page.jobs.stop, found.name, kill)).as_json())


# -- the board -------------------------------------------------------------------------------------


async def runs(page: Page, request: Request) -> Response:
    """Every run in the chosen folders, without its curves."""

    def look() -> list[dict[str, Any]]:
        return [
            {"folder": str(folder), "name": page.board.name(folder)} for folder in page.board.find()
        ]

    return JSONResponse({"runs": await run_in_threadpool(look)})


def chosen(page: Page, folders: Any) -> list[Path]:
    """Folders of runs that a request names.

    Raises:
        UserError: no list of folders that lie in the chosen ones.
    """
    if not isinstance(folders, list) or not all(isinstance(f, str) for f in folders):
        raise UserError("folders: expected a list of texts.")
    if len(folders) > 50:
        raise UserError(f"folders: got {len(folders)}, expected at most 50.")
    return [page.folders.inside(folder) for folder in folders]


async def compare(page: Page, request: Request) -> Response:
    """Runs side by side; the curves of those that the page has in this version are left out."""
    sent = await body(request)
    folders = chosen(page, sent.get("folders"))
    known = sent.get("known")
    versions = known if isinstance(known, dict) else {}

    def look() -> dict[str, Any]:
        found = boards.compared([page.board.run(f, page.reports(f)) for f in folders])
        for run in found["runs"]:
            if versions.get(run["folder"]) == run["version"]:
                run["curves"] = None
        return found

    return JSONResponse(await run_in_threadpool(look))


async def export_board(page: Page, request: Request) -> Response:
    """The board as a file."""
    sent = await body(request)
    folders = chosen(page, sent.get("folders"))
    text = await run_in_threadpool(boards.as_html, page.board, folders)
    headers = {"content-disposition": 'attachment; filename="longfactory-board.html"'}
    return HTMLResponse(text, headers=headers)


# -- models ----------------------------------------------------------------------------------------


async def models(page: Page, request: Request) -> Response:
    """Checkpoints in the chosen folders."""
    return JSONResponse({"models": await run_in_threadpool(found_models, page.folders)})


async def model_run(page: Page, request: Request) -> Response:
    """The keys by which chat and export read a checkpoint."""
    folder = page.folders.inside(request.query_params.get("folder", ""))
    return JSONResponse({"yaml": await run_in_threadpool(run_of_model, folder)})


async def chat(page: Page, request: Request) -> Response:
    """The conversation."""
    return JSONResponse(page.chat.as_json())


async def chat_do(page: Page, request: Request) -> Response:
    """Loads a model, sends a message, forgets the conversation, or closes it."""
    sent = await body(request)
    action = text_of(sent, "do")
    if action == "load":

        def load() -> None:
            folder = page.jobs.home
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "chat.yaml"
            path.touch(mode=0o600)
            path.write_text(text_of(sent, "yaml"), encoding="utf-8")
            found = page.usable(path, "chat")
            assert found.cfg is not None
            names = [found.cfg.model.model_name_or_path, *found.cfg.model.adapter_name_or_path]
            page.chat.start(path, " + ".join(str(name) for name in names))

        await run_in_threadpool(load)
    elif action == "ask":
        await run_in_threadpool(page.chat.ask, text_of(sent, "text"))
    elif action == "clear":
        await run_in_threadpool(page.chat.clear)
    elif action == "close":
        await run_in_threadpool(page.chat.close)
    else:
        raise UserError(f"do: got {action!r}, expected load, ask, clear or close.")
    return JSONResponse(page.chat.as_json())


async def index(page: Page, request: Request) -> Response:
    """The page itself."""
    return HTMLResponse((boards.STATIC / "index.html").read_text(encoding="utf-8"))


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("/", "GET", index),
    ("/api/about", "GET", about),
    ("/api/recipes", "GET", recipes),
    ("/api/recipe", "GET", recipe),
    ("/api/data_sets", "GET", data_sets),
    ("/api/check", "POST", check),
    ("/api/dry_run", "POST", dry_run),
    ("/api/plan", "POST", plan),
    ("/api/preview", "POST", preview),
    ("/api/jobs", "GET", jobs),
    ("/api/jobs", "POST", start),
    ("/api/jobs/{name}", "GET", job),
    ("/api/jobs/{name}/stop", "POST", stop),
    ("/api/jobs/{name}/picture", "GET", picture),
    ("/api/runs", "GET", runs),
    ("/api/compare", "POST", compare),
    ("/api/export_board", "POST", export_board),
    ("/api/models", "GET", models),
    ("/api/model_run", "GET", model_run),
    ("/api/chat", "GET", chat),
    ("/api/chat", "POST", chat_do),
)


def make_app(page: Page) -> Starlette:
    """The application, without the rules of who may ask (`access.Access`)."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(page.chat.close)

    routes: list[Any] = [route(path, method, handler, page) for path, method, handler in ROUTES]
    routes.append(Mount("/static", StaticFiles(directory=boards.STATIC)))
    return Starlette(routes=routes, lifespan=lifespan)


def _same(one: str, other: Path) -> bool:
    return Path(one).resolve() == other.resolve()
