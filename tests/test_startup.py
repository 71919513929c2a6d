"""Where the time up to the first step's end goes, in parts and in words."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from longfactory import startup
from longfactory.processes import begin_of_process


@pytest.fixture(autouse=True)
def nothing_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(startup, "_now", None)
    yield
    startup.end("test")


def test_parts_follow_each_other() -> None:
    counted = startup.Startup(began=100.0)
    counted.done("launcher", 104.0)
    counted.spent(startup.COMPILING, 2.0)
    counted.done("guard", 110.0)
    counted.spent(startup.COMPILING, 0.5)
    counted.spent(startup.SCHEDULES, 1.0)
    counted.done("first step", 113.0)
    counted.functions, counted.kernels = 7, 2
    assert counted.seconds == 13.0
    assert counted.row() == {
        "launcher": 4.0,
        "guard": 6.0,
        "first step": 3.0,
        "of these compiling": 2.5,
        "of these measuring schedules": 1.0,
    }
    assert counted.line() == (
        "From the command to the end of the first step: 13.0 s: launcher 4.0, guard 6.0 (of these"
        " 2.0 compiling), first step 3.0 (of these 0.5 compiling, 1.0 measuring schedules)."
        " Compiled: 7 functions by torch, 2 Triton kernels."
    )


def test_a_part_that_comes_twice_is_added_up_and_one_without_time_is_not_told() -> None:
    counted = startup.Startup(began=0.0)
    for part, now in (("data", 1.0), ("evaluation", 1.01), ("data", 3.0)):
        counted.done(part, now)
    assert counted.parts["data"].seconds == pytest.approx(2.99)
    assert "evaluation" not in counted.line()


def test_a_command_that_a_launcher_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.BEGAN, str(begin_of_process() - 5.0))
    startup.begin(launcher=True)
    found = startup.end("imports")
    assert found is not None and found.row()["launcher"] == pytest.approx(5.0, abs=0.1)
    assert startup.begun() is None and startup.end("imports") is None
    startup.begin()
    assert (found := startup.end("imports")) is not None and "launcher" not in found.parts


@pytest.mark.processes
def test_the_begin_of_a_process_is_from_before_its_imports() -> None:
    program = (
        "import time; time.sleep(0.5); from longfactory.processes import begin_of_process;"
        "print(time.time() - begin_of_process())"
    )
    began = time.time()
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 0.5 <= float(out.stdout) <= time.time() - began + 0.1


def test_compilers_are_counted_where_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's callbacks and Triton's listener; what torch has Triton compile counts once."""
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    knobs = SimpleNamespace(compilation=SimpleNamespace(listener=None))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    startup.begin()
    before = len(callback_handler.start_callbacks)
    startup.watch_compilers()
    compiled = {"times": SimpleNamespace(total=2e6), "src": None, "metadata": {}}
    with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/0"):
        time.sleep(0.05)
        knobs.compilation.listener(**compiled, cache_hit=False)
    knobs.compilation.listener(**compiled, cache_hit=False)
    knobs.compilation.listener(**compiled, cache_hit=True)
    with startup.within(startup.SCHEDULES):
        knobs.compilation.listener(**compiled, cache_hit=True)
        time.sleep(0.05)
    found = startup.end("first step")
    assert found is not None
    assert (found.functions, found.kernels, found.stored) == (1, 1, 2)
    inside = found.parts["first step"].inside
    assert 6.05 <= inside[startup.COMPILING] < 7.0
    assert knobs.compilation.listener is None
    assert len(callback_handler.start_callbacks) == before
    assert os.environ.get(startup.BEGAN) is None
