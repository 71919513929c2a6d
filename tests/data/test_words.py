"""The word lookup for long texts equals the tokenizer, or declines."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from longfactory.data import tokens
from longfactory.data.tokens import PieceTokenizer
from longfactory.data.words import GPT2, Words, words_of
from small_tokenizers import CORPUS, SPECIAL

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")


def trained(pattern: str | None, nfc: bool = False) -> Tokenizer:
    t = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
        split = pre_tokenizers.Sequence(
            [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    t.pre_tokenizer = split
    t.decoder = decoders.ByteLevel()
    if nfc:
        t.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(CORPUS, trainer)
    return t


BACKENDS = {"gpt2": trained(None), "llama3": trained(LLAMA3), "qwen": trained(QWEN, nfc=True)}
TEXT = st.lists(
    st.one_of(
        st.sampled_from(" \n\t\r'sSdDlL1234567890.,-–“”’éß\u00a0\u2009\u2028\u0301xyzdef(){}_"),
        st.characters(max_codepoint=0x2FFF, exclude_categories=["Cs"]),
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_"]),
    ),
    max_size=80,
).map("".join)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_equal_or_declined(name: str, text: str) -> None:
    words = words_of(BACKENDS[name])
    assert words is not None
    words.tested = True  # the check against the tokenizer would hide a difference
    found = words.ids(text)
    if found is not None:
        assert found.tolist() == BACKENDS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", BACKENDS)
def test_long_prose_is_looked_up(name: str) -> None:
    rng = random.Random(0)
    text = "\n\n".join(
        rng.choice(CORPUS[:1] + CORPUS[2:3] + ["It’s 1,024 lines — “quoted”…\n\tindented"])
        for _ in range(300)
    )
    words = words_of(BACKENDS[name])
    assert words is not None
    found = words.ids(text)
    assert (
        found is not None
        and found.tolist() == BACKENDS[name].encode(text, add_special_tokens=False).ids
    )
    assert len(words.known) < 200


@pytest.mark.parametrize("text", ["漢字", "a\x1cb", "K\u212a", "🙂"])
def test_declined_texts(text: str) -> None:
    words = words_of(BACKENDS["gpt2"])
    assert words is not None and words.ids(text) is None


def test_a_pattern_that_is_not_the_tokenizers_is_found_out() -> None:
    """The first text is checked against the tokenizer; a difference turns the lookup off."""
    wrong = Words(BACKENDS["qwen"], r"[a-z ]+|[^a-z ]+", False, {}, [])
    text = "def f(x): return x and x or x again and again "
    wrong.known = {w: (0,) for w in wrong.pattern.findall(text)}
    assert wrong.ids(text) is None and wrong.ids(text) is None
    leaves_out = Words(BACKENDS["gpt2"], r"[a-z]+", False, {}, [])
    leaves_out.tested = True
    assert leaves_out.ids("two words") is None
    assert GPT2 in words_of(BACKENDS["gpt2"]).pattern.pattern  # type: ignore[union-attr]


def test_added_tokens_with_habits_are_declined() -> None:
    backend = trained(None)
    backend.add_tokens([AddedToken("<tool>", lstrip=True)])
    words = words_of(backend)
    assert words is not None and words.ids("call <tool> now") is None
    text = "call it now<|im_end|>\n"
    assert words.ids(text).tolist() == backend.encode(text).ids  # type: ignore[union-attr]


def test_other_tokenizers_have_no_lookup(tokenizers: dict[str, Any]) -> None:
    assert PieceTokenizer(tokenizers["meta"]).words is None
    spaced = Tokenizer(models.BPE())
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert words_of(spaced) is None


def test_pieces_of_any_length_equal_encode(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LONG", 10)
    texts = [
        "short",
        "a longer text, a longer text",
        "with <|im_end|> a special token",
        "漢字 and more text here",
        "\n\n   spaces   \n",
    ]
    found = PieceTokenizer(tokenizer).strings(texts)
    assert {t: i.tolist() for t, i in found.items()} == {
        t: tokenizer.encode(t, add_special_tokens=False) for t in texts
    }
