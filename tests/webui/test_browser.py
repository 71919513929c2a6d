"""The page in a real browser (Chromium without a window), driven as a person would: real runs of a
tiny model. Everything is on this machine: a request to anywhere else fails the test.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longfactory_dev.screenshots import until
from served_page import Served, served
from small_runs import text, write_model

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(900)]
LONG = 300_000
"""Milliseconds for what imports torch: the tests share their machine."""


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.fail("The browser tests need Chromium. Run: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail('The browser tests need playwright. Run: pip install "longfactory[dev]"')
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model", 0)
    random.seed(0)
    rows = [{"instruction": f"say {i}", "output": text(30)} for i in range(24)]
    (home / "data").mkdir()
    (home / "data" / "talks.json").write_text(json.dumps(rows))
    info = {"talks": {"file_name": "talks.json"}}
    (home / "data" / "dataset_info.json").write_text(json.dumps(info))
    (home / "tiny.yaml").write_text(
        "# A tiny model.\n"
        "model_name_or_path: model  # in this folder\n"
        "stage: sft\nfinetuning_type: full\ndataset: talks\ntemplate: chatml\ncutoff_len: 128\n"
        "output_dir: out/one\nmax_steps: 6\nlogging_steps: 1\nsave_steps: 100\n"
        "per_device_train_batch_size: 2\nlearning_rate: 1.0e-3\nuse_cpu: true\n"
    )
    before = os.getcwd()
    os.chdir(home)
    os.environ["LONGFACTORY_CACHE"] = str(home / "cache")
    yield home
    os.chdir(before)
    del os.environ["LONGFACTORY_CACHE"]


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Served]:
    with served(home) as found:
        yield found
        for job in found.page.jobs.all():
            if job.ended is None:
                found.page.jobs.stop(job.name, kill=True)


@pytest.fixture
def open_page(browser: Any, server: Served) -> Iterator[Callable[[], Any]]:
    """A new viewer: cookies and storage of its own."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def asked(request: Any) -> None:
        if not request.url.startswith((server.url, "data:", "blob:")):
            wrong.append(request.url)

    def opened() -> Any:
        context = browser.new_context(viewport={"width": 1500, "height": 950})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", asked)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda said: wrong.append(said.text) if "Content Security" in said.text else None,
        )
        page.goto(server.url)
        page.wait_for_selector("[data-key=stage]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == [], "the page failed, or asked for what is not its own"


def compose(page: Any, **keys: object) -> None:
    """The recipe, with keys changed through the form."""
    until(page, "document.querySelectorAll('#recipe option').length > 1")
    page.select_option("#recipe", label="tiny.yaml")
    until(page, "document.querySelector('#yaml').value.includes('A tiny model')")
    for name, value in keys.items():
        page.fill(f"[data-key={name}]", str(value))
    page.wait_for_selector("#start:not([disabled])")


def test_composing_says_what_is_wrong_as_one_types(open_page: Callable[[], Any]) -> None:
    page = open_page()
    compose(page, learning_rate="2e-3")
    yaml = page.input_value("#yaml")
    assert "learning_rate: 2e-3\n" in yaml and "# in this folder" in yaml
    assert page.input_value("[data-key=template]") == "chatml"
    assert page.input_value("[data-key=stage]") == "sft"
    page.fill("#yaml", yaml + "learning_rat: 1\n")
    page.wait_for_selector("#verdict .problem >> text=Did you mean learning_rate?")
    assert page.is_disabled("#start")
    page.fill("#yaml", yaml + "trust_remote_code: true\n")
    page.wait_for_selector("#verdict .problem >> text=--allow_code")
    page.wait_for_selector("#verdict .warning >> text=executes code that comes with the model")
    page.fill("#yaml", yaml)
    page.wait_for_selector("#start:not([disabled])")
    page.select_option("[data-key=stage]", "dpo")
    assert "stage: dpo\n" in page.input_value("#yaml")
    page.click("#other summary")
    page.fill("#search", "dropout")
    page.fill("#found [data-key=lora_dropout]", "0.1")
    assert "lora_dropout: 0.1\n" in page.input_value("#yaml")


def test_dry_run_plan_and_data_stand_beside_the_run(open_page: Callable[[], Any]) -> None:
    page = open_page()
    compose(page)
    until(
        page,
        "document.querySelector('#dry').textContent.includes('output_dir: out/one')",
        timeout=LONG,
    )
    page.select_option("#gpus", "2")
    until(page, "document.querySelector('#plan').textContent.includes('2 x H100')", timeout=LONG)
    page.click("#show-data")
    page.wait_for_selector("#samples .sample", timeout=LONG)
    trained = page.text_content("#samples .sample .trained")
    assert trained and len(trained) > 20
    assert "say 0" in (page.text_content("#samples .sample pre") or "")
    assert "say 0" not in trained


def test_a_run_is_followed_by_two_viewers_and_compared(
    open_page: Callable[[], Any], home: Path, tmp_path: Path
) -> None:
    first = open_page()
    for out, rate in (("out/one", "1e-3"), ("out/two", "5e-3")):
        compose(first, output_dir=out, learning_rate=rate)
        first.click("#start")
        first.wait_for_selector(f"#jobs .job.here >> text={out}")
        first.click("nav button[data-tab=compose]")
    second = open_page()
    second.click("nav button[data-tab=runs]")
    until(second, "document.querySelectorAll('.job').length >= 2")
    first.close()  # the runs go on
    until(
        second,
        "[...document.querySelectorAll('.job')].slice(0, 2)"
        ".every((job) => job.textContent.includes('done'))",
        timeout=LONG,
    )
    assert "step 6 of 6" in (second.text_content("#jobs") or "")
    assert (home / "out" / "two" / "model.safetensors").is_file()
    second.click("nav button[data-tab=compare]")
    second.wait_for_selector("#board .chart path.line")
    titles = second.locator("#board .chart h4").all_text_contents()
    assert titles[0] == "Loss" and "Gradient norm" in titles and "Learning rate" in titles
    loss = second.locator("#board .chart").first.locator("path.line")
    assert sorted(loss.evaluate_all("all => all.map((p) => p.dataset.run)")) == [
        *("out/one", "out/two"),
    ]
    assert "learning_rate" in (second.text_content("#board .differences") or "")
    second.check("#board input[type=checkbox]")
    # A line that is cut, and a run that vanishes, while the board is open.
    with (home / "out" / "one" / "trainer_log.jsonl").open("a") as log:
        log.write(
            '{"current_steps": 7, "loss"\n{"current_steps": 8, "total_steps": 8, "loss": 1}\n'
        )
    second.wait_for_selector("#board >> text=1 lines of its log cannot be read")
    os.rename(home / "out" / "two", tmp_path / "two")
    second.wait_for_selector("#board >> text=its log is not there any more")
    assert second.locator("#board .chart").first.locator("path.line").count() == 2
    os.rename(tmp_path / "two", home / "out" / "two")
    with second.expect_download() as download:
        second.click("#export-board")
    download.value.save_as(tmp_path / "board.html")
    # The file alone, without a network.
    context = second.context.browser.new_context(offline=True)
    alone = context.new_page()
    wrong: list[str] = []
    alone.on("pageerror", lambda error: wrong.append(str(error)))
    alone.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    alone.goto((tmp_path / "board.html").as_uri())
    alone.wait_for_selector("#board .chart path.line")
    assert "out/one" in (alone.text_content("#board") or "")
    assert wrong == []
    context.close()


def test_a_run_is_stopped_and_has_saved(open_page: Callable[[], Any], home: Path) -> None:
    page = open_page()
    compose(page, output_dir="out/long", max_steps=100000)
    page.click("#start")
    until(
        page,
        "document.querySelector('#job')?.textContent.match(/step \\d+ of 100000/)",
        timeout=LONG,
    )
    page.click("#stop")
    page.wait_for_selector("#job-bar >> text=the same run goes on from there", timeout=LONG)
    assert list((home / "out" / "long").glob("checkpoint-*/trainer_state.json"))
    assert "longfactory train" in (page.text_content("#console") or ""), "how it goes on"


def test_chat_and_export(open_page: Callable[[], Any], home: Path) -> None:
    page = open_page()
    page.click("nav button[data-tab=models]")
    until(page, "document.querySelectorAll('#model option').length > 1")
    page.select_option("#model", label="model (model)")
    until(page, "document.querySelector('#model-yaml').value.includes('model')")
    keys = page.input_value("#model-yaml").replace("256", "8")
    page.fill("#model-yaml", keys + f"template: chatml\nexport_dir: {home / 'exported'}\n")
    page.fill(
        "#model-yaml",
        "\n".join(
            dict.fromkeys(
                line
                for line in page.input_value("#model-yaml").splitlines()
                if "_exported" not in line
            )
        ),
    )
    page.click("#load")
    until(
        page,
        f"document.querySelector('#chat-state').textContent === {json.dumps(str(home / 'model'))}",
        timeout=LONG,
    )
    page.fill("#message", "hello <b>you</b>")
    page.press("#message", "Enter")
    page.wait_for_selector(".message.user >> text=hello <b>you</b>")
    until(
        page,
        f"document.querySelector('#chat-state').textContent === {json.dumps(str(home / 'model'))}",
        timeout=LONG,
    )
    other = open_page()
    other.click("nav button[data-tab=models]")
    other.wait_for_selector(".message.user >> text=hello <b>you</b>")
    page.click("#unload")
    page.click("#export")
    until(
        page,
        "document.querySelector('#job')?.textContent.includes('The model is in')",
        timeout=LONG,
    )
    assert (home / "exported" / "model.safetensors").is_file()


def test_a_model_is_measured_and_gets_layers(open_page: Callable[[], Any], home: Path) -> None:
    page = open_page()
    page.click("nav button[data-tab=models]")
    keys = f"model_name_or_path: {home / 'model'}\ntemplate: chatml\nuse_cpu: true\n"
    page.fill("#model-yaml", keys + f"nproc_per_node: 1\nexport_dir: {home / 'grown'}\n")
    page.fill("#lengths", "600")
    page.fill("#texts", "1")
    page.click("#measure")
    page.wait_for_selector("#job-picture img", timeout=LONG)
    until(page, "document.querySelector('#job-picture img').naturalWidth > 100", timeout=LONG)
    assert "needle" in page.text_content("#console")
    page.click("nav button[data-tab=models]")
    page.fill("#layers", "2")
    page.click("#expand")
    until(
        page, "document.querySelector('#console')?.textContent.includes('A model of')", timeout=LONG
    )
    assert (home / "grown" / "model.safetensors").is_file()


def test_a_page_of_another_site_can_do_nothing(
    open_page: Callable[[], Any], browser: Any, server: Served, tmp_path: Path
) -> None:
    """A page that is served elsewhere on this machine, in a browser that is let in here."""
    started = len(server.page.jobs.all())
    send = json.dumps(json.dumps({"command": "train", "yaml": (Path("tiny.yaml")).read_text()}))
    (tmp_path / "index.html").write_text(
        "<script>window.told = [];\n"
        f"const url = '{server.url}/api/jobs', body = {send};\n"
        "const tries = [{mode: 'no-cors', headers: {'content-type': 'text/plain'}},"
        " {headers: {'content-type': 'application/json'}}, {mode: 'no-cors'}];\n"
        "Promise.all(tries.map((o) => fetch(url, {method: 'POST', body, ...o})"
        ".then((r) => told.push(r.type), (e) => told.push('refused'))))"
        ".then(() => fetch(url).then((r) => r.text().then((t) => told.push(t)), () => told.push('refused')))"
        ".then(() => { window.done = true; });</script>"
        f"<iframe src='{server.url}/'></iframe>"
    )
    open_page()
    handler = lambda *a: _Quiet(*a, directory=str(tmp_path))  # noqa: E731
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(f"http://localhost:{other.server_port}/")
        until(page, "window.done === true", timeout=60_000)
        assert all(t in ("refused", "opaque") for t in page.evaluate("told"))
        time.sleep(0.2)
        assert len(server.page.jobs.all()) == started
        frame = page.frames[1]
        assert frame.query_selector("#yaml") is None, "the page is shown inside another one"
    finally:
        context.close()
        other.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_token_lets_a_browser_in(browser: Any, home: Path) -> None:
    with served(home, token="a token of enough characters") as server:
        context = browser.new_context()
        page = context.new_page()
        assert page.goto(server.url).status == 401
        page.goto(f"{server.url}/?token=a%20token%20of%20enough%20characters")
        page.wait_for_selector("[data-key=stage]")
        assert "token" not in page.url
        page.reload()
        page.wait_for_selector("[data-key=stage]")
        context.close()
