"""The audit of dependencies is left out by name where it cannot be made, and never passes so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from longfactory_dev import audit


def test_without_a_network_it_says_that_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(audit, "reachable", lambda host: False)
    assert audit.main() == 0
    assert "SKIPPED: pypi.org cannot be reached" in capsys.readouterr().out


def test_without_the_tool_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == 0
    assert "SKIPPED: pip-audit is not installed" in capsys.readouterr().out


def test_what_it_finds_is_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(audit, "reachable", lambda host: True)
    ran = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=1))
    monkeypatch.setattr(audit, "subprocess", ran)
    assert audit.main() == 1


def test_a_host_that_is_not_there() -> None:
    assert not audit.reachable("host.invalid", 1.0)
