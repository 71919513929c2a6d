"""On a GPU a row of the log is read beside the update of the weights, and not after it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longfactory.train.trainer import RowTrainer


class Stream:
    """Notes what is asked of it."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


def order_of(
    monkeypatch: pytest.MonkeyPatch, event: str | None = "backward", **due: bool
) -> list[str]:
    """What is done where these are due after a step."""
    told: list[str] = []

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        told.append(f"on {stream.name}:")
        yield
        told.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream("log", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main", told))
    monkeypatch.setattr(torch.cuda, "stream", on)
    names = ("should_log", "should_evaluate", "should_save")
    trainer: Any = types.SimpleNamespace(
        _backward_ended=event,
        _log_stream=None,
        control=types.SimpleNamespace(**{name: due.get(name, False) for name in names}),
        args=types.SimpleNamespace(device=torch.device("cuda")),
    )
    with RowTrainer._beside_the_update(trainer):
        told.append("log")
    return told


def test_a_row_of_the_log_waits_for_the_backward_pass_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what changes the sums that are logged waits for the row."""
    assert order_of(monkeypatch, should_log=True) == [
        "log waits for backward",
        "on log:",
        "log",
        "end",
        "main waits for log",
    ]


@pytest.mark.parametrize("more", ["should_evaluate", "should_save"])
def test_an_evaluation_or_a_save_waits_for_the_update(
    more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert order_of(monkeypatch, should_log=True, **{more: True}) == ["log"]


def test_without_a_gpu_or_a_row_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert order_of(monkeypatch, event=None, should_log=True) == ["log"]
    assert order_of(monkeypatch) == ["log"]
