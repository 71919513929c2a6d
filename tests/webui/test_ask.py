"""Questions to processes: answers, crashes, time limits, questions that are given up."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from longfactory.processes import state_of
from longfactory.webui import ask
from longfactory.webui.ask import Answer

pytestmark = pytest.mark.processes


async def waits() -> bool:
    return False


def answer(code: str, seconds: float = 20.0) -> Answer:
    async def go() -> Answer | None:
        return await ask.ask([sys.executable, "-c", code], seconds, waits, asyncio.Semaphore(1))

    found = asyncio.run(go())
    assert found is not None
    return found


def test_an_answer_and_a_crash() -> None:
    assert answer("print('out'); import sys; print('err', file=sys.stderr)") == Answer(
        0, "out\n", "err\n"
    )
    assert answer("import os; os.abort()").status == -6
    assert answer("import sys; print(repr(sys.stdin.read()))").output == "''\n"


def test_a_process_that_does_not_answer_is_ended_with_its_children() -> None:
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    found = answer(code, seconds=2.0)
    assert found.status is None and "Ended after 2 seconds" in found.error
    assert time.monotonic() - began < 20
    assert state_of(int(found.output)) in (None, "Z")


def test_a_question_that_nobody_waits_for() -> None:
    async def go() -> Answer | None:
        async def given_up() -> bool:
            return True

        code = "import time; time.sleep(60)"
        return await ask.ask([sys.executable, "-c", code], 60, given_up, asyncio.Semaphore(1))

    assert asyncio.run(go()) is None


def test_much_output_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "MOST_OUTPUT", 1000)
    found = answer("print('x' * 500_000)")
    assert found.output.startswith("x" * 1000) and "499001 bytes more" in found.output
    assert len(Answer(0, "", "e" * 9000).as_json()["error"]) == ask.TOLD
