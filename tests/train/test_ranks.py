"""What one process says to all."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.errors import ConfigError, UserError
from longfactory.train import ranks


def fails(error: Exception) -> Any:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "elsewhere", "words"),
    [
        (UserError("no weights"), UserError, "Process 1: no weights"),
        (ConfigError("no key"), UserError, "Process 1: no key"),
        # the launcher starts a run again after these, and not after what the user can put right
        (KeyError("a bug"), RuntimeError, "Process 1: KeyError: 'a bug'"),
    ],
)
def test_where_one_process_fails_all_do(
    error: Exception, elsewhere: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def from_all(x: Any) -> list[Any]:
        """Of two processes, of which the second fails and speaks first."""
        sent.append(x)
        return [None, sent[0]]

    monkeypatch.setattr(ranks, "from_all", from_all)
    with pytest.raises(type(error)) as own:
        ranks.or_all_fail(fails(error))
    assert own.value is error
    with pytest.raises(elsewhere) as others:
        ranks.or_all_fail(lambda: 1)
    assert type(others.value) is elsewhere and str(others.value) == words
    assert len(sent) == 2 and sent[1] is None


def test_alone_or_where_none_fails() -> None:
    assert ranks.or_all_fail(lambda: 3) == 3
    with pytest.raises(KeyError):
        ranks.or_all_fail(fails(KeyError("x")))
