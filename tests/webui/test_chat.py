"""The conversation: as the page sees it, and the process that answers."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longfactory.errors import UserError
from longfactory.webui import chat as chats
from longfactory.webui import talk
from longfactory.webui.chat import Chat
from small_runs import write_model

ANSWERS = """
import json, sys
def say(**m): print(json.dumps(m), flush=True)
print("not json", flush=True); print("5", flush=True)
say(ready=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("clear"): continue
    if asked["text"] == "crash": print("out of memory", file=sys.stderr); sys.exit(9)
    if asked["text"] == "refuse": say(error="too long"); continue
    say(part="one "); say(part="two"); say(answer="one two " + asked["text"])
"""


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setattr(chats, "talk_command", lambda run: [sys.executable, "-c", ANSWERS])
    made = Chat()
    yield made
    made.close()


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_a_conversation(chat: Chat) -> None:
    with pytest.raises(UserError, match="none"):
        chat.ask("hello")
    chat.start(Path("run.yaml"), "a model")
    wait(lambda: chat.as_json()["state"] == "ready")
    chat.ask("hello")
    wait(lambda: chat.as_json()["state"] == "ready")
    assert chat.as_json()["messages"] == [
        {"role": "user", "text": "hello"},
        {"role": "assistant", "text": "one two hello"},
    ]
    chat.ask("refuse")
    wait(lambda: chat.as_json()["state"] == "ready")
    assert chat.as_json()["error"] == "too long" and len(chat.as_json()["messages"]) == 2
    chat.clear()
    assert chat.as_json()["messages"] == []
    chat.ask("crash")
    wait(lambda: chat.as_json()["state"] == "ended")
    assert "status 9" in chat.as_json()["error"]
    chat.start(Path("run.yaml"), "another")
    wait(lambda: chat.as_json()["state"] == "ready")
    assert chat.as_json()["error"] == "" and chat.as_json()["model"] == "another"
    chat.close()
    assert chat.as_json()["state"] == "none"


def test_the_process_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(talk, "die_with_parent", lambda: None)
    write_model(tmp_path / "model", 0)
    words = [
        f"model_name_or_path={tmp_path / 'model'}",
        "template=chatml",
        "max_new_tokens=4",
        "do_sample=false",
    ]
    asked = [{"text": "hello"}, {"clear": True}, {"text": "hello"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(x) + "\n" for x in asked)))
    assert talk.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    assert said[0] == {"ready": True}
    answers = [x["answer"] for x in said if "answer" in x]
    assert len(answers) == 2 and answers[0] == answers[1], "the conversation was not forgotten"
    assert talk.main([f"model_name_or_path={tmp_path / 'missing'}", "template=chatml"]) == 2
    assert "error" in json.loads(capsys.readouterr().out.splitlines()[-1])
