"""The data probe: what is trained is told from what is not, in at most 40 lines."""

from __future__ import annotations

import re
from typing import Any

from longfactory.data.row import TokenizedDocument
from longfactory.data.samples import ENDS, GREEN, decoded_samples, preview, told


class Words:
    """A tokenizer whose tokens are words, or lines."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        assert not skip_special_tokens
        return "".join("line\n" if token == 9 else f"w{token} " for token in tokens)


class Items(list[Any]):
    @property
    def lengths(self) -> list[int]:
        return [sum(len(d.input_ids) for d in item) for item in self]


def data() -> Items:
    short = [TokenizedDocument([1, 2, 3, 4], [-100, -100, 3, 4])]
    long = [TokenizedDocument([9] * 100, [-100] * 60 + [9] * 40)]
    pair = [
        TokenizedDocument([1, 2], [-100, -100], "prompt", 2),
        TokenizedDocument([5, 6], [-100, 6], "chosen", 2, parent=0),
    ]
    return Items([short, long, pair, short])


def test_the_first_the_longest_and_a_random_one() -> None:
    samples = decoded_samples(data(), Words(), 0)
    assert [sample.which for sample in samples] == ["first", "longest", "random"]
    assert [sample.number for sample in samples[:2]] == [0, 1] and samples[2].number in (2, 3)
    parts = samples[0].documents[0].parts
    assert [(part.text, part.trained) for part in parts] == [("w1 w2 ", False), ("w3 w4 ", True)]
    assert (samples[1].trained, samples[1].tokens) == (40, 100)
    # A stream has no length: what is there is its beginning.
    assert [s.number for s in decoded_samples(iter(data()), Words(), 0)][:2] == [0, 1]
    assert decoded_samples(Items(), Words(), 0) == ()
    assert [s.which for s in decoded_samples(Items(data()[:1]), Words(), 0)] == ["first"]


def test_samples_on_a_terminal_have_at_most_40_lines() -> None:
    samples = decoded_samples(data(), Words(), 0)
    plain, green = told(samples, False), told(samples, True)
    assert len(plain) == len(green) <= 40 and max(map(len, plain)) < 120
    assert "    w1 w2 [[w3 w4 ]]" in plain and f"    w1 w2 {GREEN}w3 w4 \x1b[0m" in green
    assert any(re.fullmatch(r" +\.\.\. 91 lines \.\.\.", line) for line in plain)
    assert "    [[line]]" in plain and "    line" in plain  # of the longest, tail and head


def test_text_cannot_move_the_cursor() -> None:
    class Escapes(Words):
        def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
            return "\x1b[2Jbad\r"

    lines = told(decoded_samples(Items(data()[:1]), Escapes(), 0), False)
    assert not any(c in line for line in lines for c in "\x1b\r") and "�[2Jbad�" in lines[1]


class Counting(Words):
    """Counts what it is asked to decode."""

    decoded = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        self.decoded += len(tokens)
        return super().decode(tokens, skip_special_tokens)


def test_the_sample_that_a_run_shows_has_at_most_40_lines_however_long_it_is() -> None:
    n = 200_000
    first, last = [9] * (n - 10), list(range(10, 20))
    long = [TokenizedDocument(first + last, [-100] * (n - 10) + last)]
    tokenizer = Counting()
    lines = preview(long, tokenizer).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) < 120
    assert lines[0] == "10 of 200,000 tokens are trained, [[like this]]:"
    scored = "10 of 200,000 tokens are answers, scored at their last token, [[like this]]:"
    assert preview(long, Words(), "rm").splitlines()[0] == scored
    assert lines[1].strip() == "line" and lines[-1].endswith("w18 w19 ]]")
    assert tokenizer.decoded == 2 * ENDS

    packed = [TokenizedDocument([1, 2], [-100, 2], sample=i) for i in range(60)]
    lines = preview(packed, tokenizer).splitlines()
    assert len(lines) == 40 and lines[0].startswith("60 of 120 tokens are trained")
    assert lines[1] == "  1 text: w1 [[w2 ]]" and lines[-1] == "  60 text: w1 [[w2 ]]"
    assert lines[20] == "    ... 22 lines ..."
    # of a pair that is longer than its ends, both answers' ends keep their numbers
    pair = [TokenizedDocument([1] * n, [1] * n, role) for role in ("chosen", "rejected")]
    lines = preview(pair, tokenizer).splitlines()
    assert len(lines) <= 40 and lines[1].startswith("  1 chosen: [[w1 ")
    assert lines[-1].endswith("w1 ]]")
