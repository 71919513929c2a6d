"""Chat templates that would not end, or would take all memory: a sentence, or a bad row, in time."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from longfactory.data import derive, limits
from longfactory.data.derive import ChatTemplate
from longfactory.data.errors import BadRow
from longfactory.data.template import Message
from longfactory.errors import DataError
from small_runs import write_tokenizer

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.limited.__wrapped__, "__defaults__", (0.3, 1 << 28))
    monkeypatch.setattr(limits.ends_apart, "__defaults__", (1.0,))


def template(tokenizer: Any, text: str) -> ChatTemplate:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LONG + PLAIN, "takes longer than"),
        ("{{ 9**9**9 }}" + PLAIN, r"raises numbers to powers \(line 1\)"),
        ("{% set n = 2 %}\n{{ n ** n }}" + PLAIN, r"powers \(line 2\)"),
        (
            "{% set ns = namespace(x=9) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}"
            "{% endfor %}" + PLAIN,
            "takes longer than",
        ),
    ],
)
def test_refused_at_once(text: str, words: str, tokenizer: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(DataError, match=words):
        template(tokenizer, text)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ 'a' * 10000000000 }}", "more than 256 MB"),
        ("{{ 'a' | center(10000000000) }}", "more than 256 MB"),
        ("{{ '%10000000000d' % 1 }}", "more than 256 MB|too big|too many"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
        ("{% for i in range(1000000000) %}{% endfor %}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{{ messages[99].content.x }}", "refuses the conversation"),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|refuses"),
        (LONG, "takes longer than 0.3 s"),
    ],
)
def test_a_conversation_is_a_bad_row(text: str, words: str, tokenizer: Any) -> None:
    """A template that does it only where the message says so."""
    condition = "{% if messages[0].content == 'boom' %}" + text + "{% endif %}"
    found = template(tokenizer, condition + PLAIN)
    begun = time.monotonic()
    with pytest.raises(BadRow, match=words):
        found.render([Message("user", "boom")], None, None, False)
    assert time.monotonic() - begun < 3
    assert "hello" in found.render([Message("user", "hello")], None, None, False)


def test_the_run_ends_after_some_that_are_late(tokenizer: Any) -> None:
    found = template(
        tokenizer, "{% if messages[0].content == 'x' %}" + LONG + "{% endif %}" + PLAIN
    )
    for _ in range(derive.MOST_LATE - 1):
        with pytest.raises(BadRow):
            found.render([Message("user", "x")], None, None, False)
    with pytest.raises(DataError, match="took too much for 3 conversations"):
        found.render([Message("user", "x")], None, None, False)


def test_keywords_are_no_powers() -> None:
    limits.refuse_powers("{{ f(**x) }}{{ dict(a=1, **y) }}{% unknown %}")
    limits.refuse_powers("{{ unfinished")


def test_another_timer_goes_on() -> None:
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    rest = signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with limits.limited(5.0):
            pass
        time.sleep(0.1)
        assert seen == [1]
        with pytest.raises(limits.TooMuch, match=r"longer than 0\.05 s"), limits.limited(0.05):
            while True:
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *rest)


def test_the_cost() -> None:
    begun = time.perf_counter()
    for _ in range(100):
        with limits.limited():
            pass
    assert (time.perf_counter() - begun) / 100 < 1e-3
