"""The progress line and the lines of the log, and what other packages say."""

from __future__ import annotations

import io
import logging
import os
import re
import types
import warnings
from typing import Any

import pytest
from tqdm import tqdm
from transformers import TrainerControl, TrainerState

from longfactory import terminal
from longfactory.train import display
from longfactory.train.display import Measured, ProgressLine, left, told
from longfactory.train.meter import Cost, Meter, Rates


class Terminal(io.StringIO):
    """stderr as a terminal."""

    def isatty(self) -> bool:
        return True


def state(step: int, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=4, is_world_process_zero=main)


def metered() -> Meter:
    meter = Meter(peak=1e3)
    meter.since_log = cost = Cost(1, 2.0, 0.01, 2000.0, 2048.0, 4096.0, 1e3)
    meter.recent.append(cost)
    meter.peak_memory = 62.91
    return meter


def test_a_row_of_the_log_in_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "longfactory")
    meter = metered()
    line, first = ProgressLine(meter), Measured(meter)
    logs = {"loss": 1.23456, "grad_norm": 0.5, "learning_rate": 2e-5, "rewards/accuracies": 0.75}
    for callback in (first, line):
        callback.on_log(None, state(1), None, logs=logs)
    assert caplog.messages == [
        "step 1/4: loss 1.235, grad_norm 0.5, lr 2e-05, rewards/accuracies 0.75,"
        " 1,000 tokens/s/GPU, MFU 50 %, peak 62.9 GiB, data wait 0.5 %, padding 2.3 %,"
        " rows 48.8 % full"
    ]
    # trackers, which come after it, have the rates too
    assert logs["tokens_per_second_per_gpu"] == 1000.0 and logs["mfu"] == 0.5
    line.on_log(None, state(2), None, logs={"eval_loss": 2.0, "eval_runtime": 3.25})
    assert caplog.messages[1] == "evaluation after step 2/4: eval_loss 2, eval_runtime 3.25"
    for other in ({"train_loss": 1.0, "total_flos": 1.0}, {}):
        line.on_log(None, state(4), None, logs=other)
    line.on_log(None, state(4, main=False), None, logs={"loss": 1.0})
    assert len(caplog.messages) == 2


def test_words_of_rates() -> None:
    assert told(Rates(), True) == []
    words = told(
        Rates(data_wait=0.0004, padding=0.0, tokens_per_second_per_gpu=31.25, peak_memory_gib=4.55),
        False,
    )
    assert words == ["31.2 tokens/s/process", "peak 4.5 GiB (host)"]
    assert left(None) == [] and left(3725.4) == ["1:02:05 left"]


def test_lines_never_break_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    line = ProgressLine(metered())
    line.on_train_begin(None, state(0), None)
    line.on_step_end(None, state(1), TrainerControl())
    handler = terminal.Handler()
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "a line of the log", (), None))
    terminal.say("a sentence")
    line.on_step_end(None, state(2), TrainerControl())
    line.on_log(None, state(2), None, logs={"loss": 0.5})
    line.on_train_end(None, state(4), None)
    assert not tqdm._instances
    text = screen.getvalue()
    assert "2/4, loss 0.5, 1,000 tokens/s" in text.split("a sentence")[1]
    assert "25%" in text and "1/4, 1,000 tokens/s/GPU, MFU 50 %, peak 62.9 GiB" in text
    # each line begins where a bar was wiped, and the bar comes again below it
    assert re.search(r"\r *\r\[\d\d:\d\d:\d\d\] a line of the log\n", text)
    assert re.search(r"\r *\ra sentence\n.*Training", text, re.DOTALL)


def test_without_a_terminal_there_is_no_bar_and_no_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "longfactory")
    now = types.SimpleNamespace(t=0.0)
    monkeypatch.setattr(display.time, "monotonic", lambda: now.t)
    line = ProgressLine(metered())
    line.on_train_begin(None, state(0), None)
    for step in (1, 2, 3, 4):
        now.t += 40.0
        # of step 4 there is a row of the log
        line.on_step_end(None, state(step), TrainerControl(should_log=step == 4))
    assert not tqdm._instances
    (message,) = caplog.messages
    assert message.startswith("step 2/4: 1,000 tokens/s/GPU, MFU 50 %")


def test_others_are_heard_once_and_errors_always(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = io.StringIO()
    monkeypatch.setattr("sys.stderr", heard)
    monkeypatch.delenv("LONGFACTORY_DEBUG", raising=False)
    other = logging.getLogger("a_package_of_this_test")
    other.addHandler(logging.StreamHandler(heard))
    other.setLevel(logging.WARNING)
    terminal.quiet(other, main=True)
    for _ in range(2):
        other.warning("a warning that matters")
        other.error("an error: Setting accelerator to CPU")
        other.warning("Setting accelerator to CPU. If you have GPU ...")
        other.warning("There were missing keys in the checkpoint model loaded: ['lm_head.weight'].")
        other.info("chatter")
    lines = heard.getvalue().splitlines()
    assert sum("a warning that matters" in line for line in lines) == 1
    assert sum("an error" in line for line in lines) == 2 and len(lines) == 3
    other.warning(
        "There were missing keys in the checkpoint model loaded: ['a', 'lm_head.weight']."
    )
    assert "['a', 'lm_head.weight']" in heard.getvalue()
    other.setLevel(logging.INFO)  # log_level: info
    other.info("a note")
    assert "a note" in heard.getvalue()


def test_replicas_keep_to_errors_unless_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    filter_, theirs = terminal.OfOthers(main=False), logging.getLogger("transformers")
    before = theirs.level

    def passes(level: int) -> bool:
        return filter_.filter(logging.LogRecord("x", level, "", 0, f"{level}", (), None))

    try:
        theirs.setLevel(logging.WARNING)
        assert [passes(n) for n in (logging.INFO, logging.WARNING, logging.ERROR)] == [0, 0, 1]
        theirs.setLevel(logging.INFO)  # log_level_replica: info
        assert passes(logging.INFO)
    finally:
        theirs.setLevel(before)


def test_bars_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TQDM_DISABLE", "TQDM_MININTERVAL", "TQDM_MAXINTERVAL")
    for name in (*names, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    terminal.slow_bars()
    assert not set(names) & set(os.environ)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setenv("RANK", "1")
    terminal.slow_bars()
    assert [os.environ.pop(name) for name in names] == ["1", "30", "30"]


@pytest.mark.parametrize("message", ["barrier(): using the device under current context.", "mine"])
def test_warnings_of_python_are_one_line(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = io.StringIO()
    monkeypatch.setattr("sys.stderr", heard)
    text = warnings.formatwarning(message, UserWarning, "/lib/torch/x.py", 7, "  warnings.warn(")
    record: Any = logging.LogRecord("py.warnings", logging.WARNING, "", 0, "%s", (text,), None)
    passed = terminal.OfOthers().filter(record)
    assert passed == (message == "mine")
    if passed:
        assert record.getMessage() == "/lib/torch/x.py:7: UserWarning: mine"
