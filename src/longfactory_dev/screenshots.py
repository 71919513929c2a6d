"""The pictures of docs/webui.md: real runs of a tiny model, started and watched through the page in
Chromium. `python -m longfactory_dev.screenshots [FOLDER] [--part runs|models]`, by default all of
them, into docs/images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PORT = 7861
LONG = 600_000
"""Milliseconds for what trains."""
SMALL = 200_000
"""Bytes of a picture."""
MODEL = """\
model_name_or_path: smollm2
export_dir: expanded
max_new_tokens: 64
use_cpu: true
nproc_per_node: 1
"""
RUN = """\
# Full fine-tuning of a tiny model, to try the page.
model_name_or_path: model
train_from_scratch: true

stage: sft
finetuning_type: full
sequence_parallel_size: 1       # 8 shards each row over eight GPUs
dataset: manual_sft
template: chatml
cutoff_len: 2048
packing: true

output_dir: outputs/small_rate
logging_steps: 1
include_num_input_tokens_seen: true
per_device_train_batch_size: 1
learning_rate: 1.0e-3
max_steps: 200
use_cpu: true
"""


def make_home(home: Path) -> None:
    """A folder with a tiny model, the manual's data and a run."""
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "make_model.py", "tiny", home / "model"], check=True
    )
    shutil.copytree(ROOT / "data", home / "data")
    (home / "run.yaml").write_text(RUN, encoding="utf-8")


def take(page: Any, target: Path, selector: str | None = None) -> None:
    """Saves a picture of the page, or of a part of it."""
    part = page.locator(selector) if selector is not None else page
    part.screenshot(path=str(target))
    size = target.stat().st_size
    print(f"{target}: {size} bytes", flush=True)
    if size >= SMALL:
        raise SystemExit(f"{target} has {size} bytes, expected fewer than {SMALL}.")


def until(page: Any, expression: str, timeout: float = 30_000) -> None:
    """Waits until a JavaScript expression is true in the page.

    playwright's own wait_for_function makes code from a text inside of the page, which the page's
    content security policy forbids.

    Args:
        timeout: milliseconds.
    Raises:
        AssertionError: it does not become true.
    """
    end = time.monotonic() + timeout / 1000
    while not page.evaluate(f"() => Boolean({expression})"):
        assert time.monotonic() < end, f"not true after {timeout / 1000:.0f} s: {expression}"
        page.wait_for_timeout(100)


def walk_through(page: Any, folder: Path) -> None:
    """Composes a run, trains it twice, and compares."""
    until(page, "document.querySelectorAll('#recipe option').length > 1")
    page.select_option("#recipe", label="run.yaml")
    page.wait_for_selector("#start:not([disabled])")
    for place, said in (("#dry", "output_dir"), ("#plan", "H100")):
        until(
            page, f"document.querySelector('{place}').textContent.includes('{said}')", timeout=LONG
        )
    take(page, folder / "webui_compose.png")
    page.click("#show-data")
    page.wait_for_selector("#samples .sample", timeout=LONG)
    take(page, folder / "webui_data.png", "#samples .sample >> nth=0")
    page.click("#start")
    page.wait_for_selector("#job >> text=done", timeout=LONG)
    page.click("nav button[data-tab=compose]")
    page.fill("[data-key=learning_rate]", "4.0e-3")
    page.fill("[data-key=output_dir]", "outputs/large_rate")
    page.wait_for_selector("#start:not([disabled])")
    page.click("#start")
    until(page, "document.querySelectorAll('.job').length === 2")
    until(
        page,
        "document.querySelector('.job.here')?.textContent.match(/step (?!\\d of)\\d+ of 200/)",
        timeout=LONG,
    )
    take(page, folder / "webui_runs.png")
    until(
        page,
        "[...document.querySelectorAll('.job')].every((job) => job.textContent.includes('done'))",
        timeout=LONG,
    )
    page.click("nav button[data-tab=compare]")
    page.wait_for_selector("#board .differences")
    page.click("#chooser summary")
    take(page, folder / "webui_board.png")


def talk_and_measure(page: Any, folder: Path) -> None:
    """Talks with a model, measures it at length, and adds layers to it."""
    page.click("nav button[data-tab=models]")
    page.fill("#model-yaml", MODEL)
    page.click("#load")
    ready = "document.querySelector('#chat-state').textContent .endsWith('smollm2')"
    until(page, ready, timeout=LONG)
    page.fill("#message", "What is a list in Python?")
    page.press("#message", "Enter")
    page.wait_for_selector(".message.assistant", timeout=LONG)
    until(page, ready, timeout=LONG)
    page.fill("#lengths", "256,512,1024")
    page.fill("#texts", "1")
    page.fill("#layers", "6")
    take(page, folder / "webui_models.png")
    page.click("#unload")
    page.click("#expand")
    said = "document.querySelector('#console')?.textContent.includes('A model of')"
    until(page, said, timeout=LONG)
    page.wait_for_selector("#job >> text=done", timeout=LONG)
    take(page, folder / "webui_expand.png")
    page.click("nav button[data-tab=models]")
    page.click("#measure")
    page.wait_for_selector("#job-picture img", timeout=LONG)
    until(page, "document.querySelector('#job-picture img').naturalWidth > 100", timeout=LONG)
    page.wait_for_selector("#job >> text=done", timeout=LONG)
    take(page, folder / "webui_measure.png")


def main() -> None:
    """Takes the pictures.

    Raises:
        SystemExit: Chromium or playwright is missing, or a picture is too large.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--part", choices=("runs", "models", "all"), default="all")
    args = parser.parse_args()
    folder = args.folder.absolute()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is missing. Run: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="longfactory-page-") as home:
        make_home(Path(home))
        if args.part != "runs":
            words = ["model_name_or_path=smollm2-135m-instruct", "export_dir=smollm2"]
            command = [sys.executable, "-m", "longfactory.cli", "export", *words]
            subprocess.run(command, cwd=home, check=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "longfactory.cli", "webui", "--port", str(PORT)],
            cwd=home,
            env=os.environ | {"LONGFACTORY_CACHE": f"{home}/cache"},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            print(server.stdout.readline(), end="", flush=True)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(
                    executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
                )
                page = browser.new_page(viewport={"width": 1360, "height": 720})
                page.goto(f"http://127.0.0.1:{PORT}")
                if args.part != "models":
                    walk_through(page, folder)
                if args.part != "runs":
                    talk_and_measure(page, folder)
                browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
