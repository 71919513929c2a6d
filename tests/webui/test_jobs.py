"""Processes that the page starts: they go on without it, are asked to save and end, and are known
again by another server.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longfactory.errors import STOPPED, UserError
from longfactory.processes import state_of
from longfactory.webui import ask, jobs
from longfactory.webui.jobs import Jobs, terminal_text

pytestmark = pytest.mark.processes

LATER = "import time; print('began', flush=True); time.sleep(60)"
SAVES = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: print('signal', flush=True))\n"
    "print('began', flush=True); signal.pause(); time.sleep(1); print('saved'); sys.exit(75)\n"
)


@pytest.fixture
def runs_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Python code in place of the command."""

    def use(code: str) -> None:
        monkeypatch.setattr(jobs, "command_line", lambda *words: [sys.executable, "-c", code])

    return use


def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def ended(home: Jobs, name: str) -> bool:
    found = home.get(name)
    return found is not None and found.ended is not None


def test_the_command_is_a_list_of_arguments() -> None:
    words = ask.command("train", "/a folder/x; rm -rf $HOME.yaml")
    assert words == [
        *(sys.executable, "-m", "longfactory.cli", "train", "/a folder/x; rm -rf $HOME.yaml"),
    ]


def test_a_run_to_its_end(tmp_path: Path, runs_code: Callable[[str], None]) -> None:
    runs_code("import sys; print('a\\rb\\x1b[31mc'); sys.exit(int(sys.stdin.read() or 0))")
    home = Jobs(tmp_path)
    job = home.start("train", "hf_hub_token: hf_secret\nstage: sft\n", "out")
    assert job.state == "running"
    wait(lambda: ended(home, job.name))
    found = home.get(job.name)
    assert found is not None and found.state == "done" and found.status == 0
    assert home.console(job.name) == "bc\n"
    assert "hf_secret" not in home.yaml(job.name) and "stage: sft" in home.yaml(job.name)
    mode = (home.home / job.name / "run.yaml").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize(("status", "state"), [(1, "failed"), (2, "failed"), (STOPPED, "stopped")])
def test_how_runs_end(
    tmp_path: Path, runs_code: Callable[[str], None], status: int, state: str
) -> None:
    runs_code(f"raise SystemExit({status})")
    home = Jobs(tmp_path)
    job = home.start("train", "", "")
    wait(lambda: ended(home, job.name))
    found = home.get(job.name)
    assert found is not None and (found.state, found.status) == (state, status)


def test_stop_asks_once_and_lets_it_save(tmp_path: Path, runs_code: Callable[[str], None]) -> None:
    runs_code(SAVES)
    home = Jobs(tmp_path)
    job = home.start("train", "", "")
    wait(lambda: "began" in home.console(job.name))
    assert os.getpgid(job.pid) == job.pid and os.getsid(job.pid) == job.pid
    assert home.stop(job.name).state == "stopping"
    home.stop(job.name)  # another viewer: no second signal
    wait(lambda: ended(home, job.name))
    found = home.get(job.name)
    assert found is not None and found.state == "stopped"
    assert home.console(job.name) == "began\nsignal\nsaved\n"


def test_a_run_that_does_not_stop_is_ended(
    tmp_path: Path, runs_code: Callable[[str], None]
) -> None:
    runs_code("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LATER)
    home = Jobs(tmp_path)
    job = home.start("train", "", "")
    wait(lambda: "began" in home.console(job.name))
    home.stop(job.name)
    assert state_of(job.pid) not in (None, "Z")
    home.stop(job.name, kill=True)
    wait(lambda: ended(home, job.name))
    found = home.get(job.name)
    assert found is not None and (found.state, found.status) == ("failed", -signal.SIGKILL)
    assert home.stop(job.name, kill=True).ended == found.ended


def test_another_server_knows_the_run_again(
    tmp_path: Path, runs_code: Callable[[str], None]
) -> None:
    runs_code(LATER)
    first = Jobs(tmp_path)
    job = first.start("train", "", "out")
    wait(lambda: "began" in first.console(job.name))
    second = Jobs(tmp_path)
    found = second.get(job.name)
    assert found is not None and found.state == "running"
    second.stop(job.name)
    first._processes[job.name].wait()
    del first._processes[job.name]
    wait(lambda: ended(second, job.name))
    found = second.get(job.name)
    assert found is not None and found.state == "unknown"


def test_another_process_with_the_number_is_not_the_run(
    tmp_path: Path, runs_code: Callable[[str], None]
) -> None:
    runs_code("")
    home = Jobs(tmp_path)
    job = home.start("train", "", "")
    wait(lambda: ended(home, job.name))
    path = home.home / job.name / "job.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "pid": os.getpid(), "ended": None, "status": None}))
    found = Jobs(tmp_path).get(job.name)
    assert found is not None and found.state == "unknown"


def test_names_and_files_that_are_none(tmp_path: Path) -> None:
    home = Jobs(tmp_path)
    assert home.all() == []
    for name in ("../x", "", "a/b", "20260101-000000-abcdef", "20260101-000000-abcdef/.."):
        assert home.get(name) is None
    with pytest.raises(UserError, match="no run"):
        home.stop("../x")
    for text in ("{", "[]", '{"name": 1}'):
        folder = home.home / "20260101-000000-abcdef"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(text)
        assert home.all() == []
    assert "cannot be read" in home.console("20260101-000000-abcdef")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Jobs(tmp_path / "file").start("train", "", "")


def test_the_end_of_a_long_console(tmp_path: Path, runs_code: Callable[[str], None]) -> None:
    runs_code("print('x' * 100 + '\\n', end='')\nfor i in range(20000): print('line', i)")
    home = Jobs(tmp_path)
    job = home.start("train", "", "")
    wait(lambda: ended(home, job.name))
    text = home.console(job.name)
    assert text.startswith("line ") and text.endswith("line 19999\n") and len(text) <= jobs.TAIL


def test_what_a_terminal_would_show() -> None:
    assert terminal_text("0%|\r50%|\r100%|\nnext\r\n\x1b[1mbold\x1b[0m") == "100%|\nnext\nbold"


def test_what_a_process_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LONGFACTORY_WEBUI_TOKEN", "t")
    monkeypatch.setenv("HF_HOME", "/x")
    found = ask.environment({"A": "1"})
    assert "LOCAL_RANK" not in found and "LONGFACTORY_WEBUI_TOKEN" not in found
    assert found["HF_HOME"] == "/x" and found["A"] == "1"
