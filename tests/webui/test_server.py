"""The routes over HTTP: what one viewer does, another one sees; what is wrong is a sentence."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longfactory.webui import jobs, server
from longfactory.webui.models import run_of_model
from served_page import Served, served

CODE = """
import json, pathlib, sys, time
run = dict(line.split(": ", 1) for line in pathlib.Path(sys.argv[1]).read_text().splitlines())
out = pathlib.Path(run["output_dir"]); out.mkdir(parents=True, exist_ok=True)
with (out / "trainer_log.jsonl").open("w") as log:
    for step in range(3):
        log.write(json.dumps({"current_steps": step + 1, "total_steps": 3, "loss": 3.0 - step}) + "\\n")
        log.flush()
print("done")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"talks": {}}')
    return tmp_path


@pytest.fixture
def page(home: Path) -> Iterator[Served]:
    with served(home) as found:
        yield found


def run(**changes: object) -> str:
    values = {"model_name_or_path": "org/model", "dataset": "talks", "output_dir": "out"} | changes
    return "".join(f"{name}: {value}\n" for name, value in values.items())


def good(answer: tuple[int, Any, dict[str, str]]) -> Any:
    assert answer[0] == 200, answer
    return answer[1]


def bad(answer: tuple[int, Any, dict[str, str]]) -> str:
    assert answer[0] == 400, answer
    return answer[1]["error"]


def wait_for(page: Served, name: str) -> dict[str, Any]:
    end = time.monotonic() + 30
    while True:
        found = good(page.ask(f"/api/jobs/{name}"))
        if found["ended"] is not None:
            return found
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_the_page_is_made_of(page: Served, home: Path) -> None:
    assert "LongFactory" in good(page.ask("/"))
    for name in ("app.js", "board.js", "charts.js", "style.css"):
        assert page.ask(f"/static/{name}")[0] == 200
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/server.py", "/api/nothing"):
        assert page.ask(path)[0] == 404
    about = good(page.ask("/api/about"))
    assert about["folders"] == [str(home)] and not about["allow_code"]
    assert good(page.ask("/api/data_sets?folder=data")) == {"data_sets": ["talks"]}
    assert "outside" in bad(page.ask("/api/data_sets?folder=/etc"))


def test_a_recipe_is_read_from_the_folders_alone(page: Served, home: Path) -> None:
    (home / "mine.yaml").write_text(run(hf_hub_token="hf_secret"))
    (home / "link.yaml").symlink_to("/etc/hostname")
    (home / "notes.txt").write_text("x")
    [recipe] = good(page.ask("/api/recipes"))["recipes"]
    assert recipe["name"] == "mine.yaml"
    text = good(page.ask(f"/api/recipe?path={recipe['path']}"))["yaml"]
    assert "org/model" in text and "hf_secret" not in text
    for path in ("/etc/passwd", f"{home}/link.yaml", f"{home}/../x.yaml"):
        assert "outside" in bad(page.ask(f"/api/recipe?path={path}"))
    assert "no YAML file" in bad(page.ask(f"/api/recipe?path={home}/notes.txt"))


def test_check(page: Served) -> None:
    found = good(page.ask("/api/check", {"yaml": run(), "command": "train"}))
    assert found["problems"] == [] and found["arithmetic"]
    found = good(page.ask("/api/check", {"yaml": run(stage="sfd"), "command": "train"}))
    assert "stage" in found["problems"][0] and "tmp" not in found["problems"][0]
    assert "expected text" in bad(page.ask("/api/check", {"yaml": 1, "command": "train"}))
    assert "command" in bad(page.ask("/api/check", {"yaml": "", "command": "rm"}))
    for sent in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        assert "object of JSON" in bad(page.ask("/api/check", sent))


def test_questions_are_not_asked_of_runs_that_are_refused(
    page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*args: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(server, "ask", never)
    for path in ("dry_run", "plan", "preview"):
        assert "outside" in bad(page.ask(f"/api/{path}", {"yaml": run(output_dir="/etc/x")}))
        said = bad(page.ask(f"/api/{path}", {"yaml": run(trust_remote_code="true")}))
        assert "--allow_code" in said


def test_answers_of_processes(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    echo = "import sys; print(sys.argv[1:]); print(open(sys.argv[2]).read(), file=sys.stderr)"
    monkeypatch.setattr(server, "command", lambda *words: [sys.executable, "-c", echo, *words])
    found = good(page.ask("/api/dry_run", {"yaml": run()}))
    assert found["output"] == "['train', 'run.yaml', '--dry_run']\n"
    assert "output_dir: out" in found["error"]
    sent = {"yaml": run(), "gpus": 4, "gpu": "H200"}
    assert "['plan', 'run.yaml', '--gpus', '4xH200']" in good(page.ask("/api/plan", sent))["output"]
    for gpus in (0, "8", True, 10**9):
        assert "gpus" in bad(page.ask("/api/plan", {**sent, "gpus": gpus}))
    assert "gpu" in bad(page.ask("/api/plan", {**sent, "gpu": "H100 --write x"}))


def test_a_model_is_measured_and_expanded(
    page: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = (
        "import sys, pathlib; print(sys.argv[1:])\n"
        "folder = [w for w in sys.argv if w.startswith('report_dir=')]\n"
        "if folder: pathlib.Path(folder[0][11:], 'long_context.png').write_bytes(b'a picture')"
    )
    monkeypatch.setattr(jobs, "command_line", lambda *words: [sys.executable, "-c", draw, *words])
    yaml = "model_name_or_path: org/model\nexport_dir: bigger\n"
    sent = {"command": "eval", "yaml": yaml, "lengths": "200,400", "samples": "2"}
    found = wait_for(page, good(page.ask("/api/jobs", sent))["name"])
    assert "'eval'" in found["console"] and "'lengths=200,400', 'samples=2'" in found["console"]
    assert found["picture"] and page.ask(f"/api/jobs/{found['name']}/picture")[0] == 200
    for wrong in ({"lengths": "1;2"}, {"lengths": ""}, {"samples": "0"}, {"samples": "2 x=1"}):
        assert "expected" in bad(page.ask("/api/jobs", {**sent, **wrong}))
    sent = {"command": "expand", "yaml": yaml, "layers": "2"}
    found = wait_for(page, good(page.ask("/api/jobs", sent))["name"])
    words = ["expand", "num_expand=2", "model_name_or_path=org/model"]
    assert found["console"] == f"{[*words, f'export_dir={home}/bigger']}\n"
    assert not found["picture"] and "no picture" in bad(
        page.ask(f"/api/jobs/{found['name']}/picture")
    )
    assert "expected" in bad(page.ask("/api/jobs", {**sent, "layers": "2 --x"}))
    elsewhere = {**sent, "yaml": yaml.replace("bigger", "/etc/x")}
    assert "outside" in bad(page.ask("/api/jobs", elsewhere))


def test_a_run_is_started_and_two_viewers_see_it(
    page: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = lambda kind, path, *rest: [sys.executable, "-c", CODE, path]  # noqa: E731
    monkeypatch.setattr(jobs, "command_line", line)
    job = good(page.ask("/api/jobs", {"command": "train", "yaml": run()}))
    found = wait_for(page, job["name"])
    assert found["state"] == "done" and found["console"] == "done\n"
    assert found["last"]["current_steps"] == 3 and "output_dir: out" in found["yaml"]
    for _viewer in range(2):
        [seen] = good(page.ask("/api/jobs"))["jobs"]
        assert seen["name"] == job["name"] and seen["state"] == "done"
    [at] = good(page.ask("/api/runs"))["runs"]
    assert at == {"folder": str(home / "out"), "name": "out"}
    first = good(page.ask("/api/compare", {"folders": [at["folder"]]}))["runs"][0]
    assert first["curves"]["loss"][1] == [3.0, 2.0, 1.0]
    known = {at["folder"]: first["version"]}
    again = good(page.ask("/api/compare", {"folders": [at["folder"]], "known": known}))["runs"][0]
    assert again["curves"] is None and again["step"] == 3
    html = good(page.ask("/api/export_board", {"folders": [at["folder"]]}))
    assert html.startswith("<!doctype html>") and '"loss"' in html


def test_runs_that_are_not_started(page: Served, home: Path) -> None:
    for command in ("chat", "plan", "env", "--help", "rm", ""):
        assert "command" in bad(page.ask("/api/jobs", {"command": command, "yaml": run()}))
    assert "Did you mean" in bad(page.ask("/api/jobs", {"command": "train", "yaml": run(stag=1)}))
    said = bad(page.ask("/api/jobs", {"command": "train", "yaml": run(loss_path="x.py:f")}))
    assert "--allow_code" in said
    # The page cannot say otherwise.
    sent = {"command": "train", "yaml": run(trust_remote_code="true"), "allow_code": True}
    assert "--allow_code" in bad(page.ask("/api/jobs", sent))
    assert good(page.ask("/api/jobs"))["jobs"] == []
    assert not (home / "longfactory_webui").exists()
    assert page.ask("/api/jobs/..%2f..%2fetc")[0] == 404
    assert "no run" in bad(page.ask("/api/jobs/nothing/stop", {}))


def test_a_verify_report_stands_beside_its_run(
    page: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = 'import sys; open(sys.argv[3], \'w\').write(\'{"exact": false, "title": "t"}\')'
    line = lambda kind, path, *rest: [sys.executable, "-c", code, path, *rest]  # noqa: E731
    monkeypatch.setattr(jobs, "command_line", line)
    (home / "out").mkdir()
    (home / "out" / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 1}\n')
    job = good(page.ask("/api/jobs", {"command": "verify", "yaml": run()}))
    assert wait_for(page, job["name"])["verify"]["exact"] is False
    [found] = good(page.ask("/api/compare", {"folders": [str(home / "out")]}))["runs"]
    assert found["verify"]["exact"] is False


def test_the_board_of_other_folders(page: Served) -> None:
    assert "outside" in bad(page.ask("/api/compare", {"folders": ["/etc"]}))
    assert "outside" in bad(page.ask("/api/export_board", {"folders": ["/etc"]}))
    assert "list" in bad(page.ask("/api/compare", {"folders": "x"}))
    assert "at most" in bad(page.ask("/api/compare", {"folders": ["x"] * 99}))


def test_models_and_chat(page: Served, home: Path) -> None:
    adapter = home / "saves" / "lora"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere/base"}')
    (adapter / "longfactory.yaml").write_text("model_name_or_path: org/base\ntemplate: llama3\n")
    last = adapter / "checkpoint-7"
    last.mkdir()
    (last / "model.safetensors").touch()
    found = good(page.ask("/api/models"))["models"]
    assert [(m["name"], m["kind"]) for m in found] == [
        ("saves/lora", "adapter"),
        ("saves/lora/checkpoint-7", "model"),
    ]
    yaml = good(page.ask(f"/api/model_run?folder={adapter}"))["yaml"]
    assert "model_name_or_path: org/base" in yaml and "template: llama3" in yaml
    assert "outside" in bad(page.ask("/api/model_run?folder=/etc"))
    assert f"model_name_or_path: {last}" in run_of_model(last)
    assert good(page.ask("/api/chat"))["state"] == "none"
    assert "cannot be asked" in bad(page.ask("/api/chat", {"do": "ask", "text": "x"}))
    assert "do:" in bad(page.ask("/api/chat", {"do": "rm"}))
    load = {"do": "load", "yaml": "model_name_or_path: /etc\n"}
    assert "outside" in bad(page.ask("/api/chat", load))


def test_the_export_of_a_board_is_json_safe(page: Served, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": NaN, "lr": 1}\n')
    answer = page.ask("/api/compare", {"folders": [str(home / "out")]})
    json.dumps(good(answer), allow_nan=False)
