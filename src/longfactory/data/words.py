"""Long texts for byte-level BPE tokenizers: split into words once, each different word tokenised
once.

A byte-level BPE tokenizer cuts a text into words by a pattern and tokenises each word by itself, so
the ids of a text are those of its words, one after the other. A long document repeats its words;
looking them up costs a third of tokenising them. The result is equal to the tokenizer's own, and
where that cannot be known (another kind of tokenizer, characters on which pattern engines might
disagree) the text is left to the tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import chain
from typing import Any

import numpy as np
import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONG = 20_000  # characters; below that nothing is gained
_MOST_WORDS = 1_000_000
# Control characters, letters that fold to ASCII, the scripts above the CJK punctuation, and
# surrogates.
_UNSURE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u017f\u180e\u1e9e\u212a\u3000-\U0010ffff]"
)


class Words:
    """Ids of long texts, for one tokenizer and one process.

    `plain` are the added tokens that stand for themselves wherever their text stands, with their
    ids: the text is cut at them first, as the tokenizer does. Texts with an added token of another
    kind (`other`) are declined.
    """

    def __init__(
        self, backend: Any, pattern: str, nfc: bool, plain: dict[str, int], other: list[str]
    ):
        self.backend = backend
        self.pattern = regex.compile(pattern)
        self.nfc = nfc
        self.plain = plain
        # The longest of several tokens that begin at one place wins.
        longest = sorted(plain, key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if plain else None
        self.other = re.compile("|".join(map(re.escape, other))) if other else None
        self.known: dict[str, tuple[int, ...]] = {}
        self.tested = False

    def ids(self, text: str) -> np.ndarray | None:
        """[n] int32, or None where the tokenizer itself must do it."""
        parts = self.cut.split(text) if self.cut is not None else [text]
        out = []
        for i, part in enumerate(parts):
            found = np.array([self.plain[part]], dtype=np.int32) if i % 2 else self._part(part)
            if found is None:
                return None
            out.append(found)
        ids = np.concatenate(out)
        if not self.tested:
            self.tested = True
            if ids.tolist() != self.backend.encode(text, add_special_tokens=False).ids:
                # matches nothing: every text goes to the tokenizer
                self.pattern = regex.compile(r"(?!)")
                return None
        if len(self.known) > _MOST_WORDS:
            self.known.clear()
        return ids

    def _part(self, text: str) -> np.ndarray | None:
        if _UNSURE.search(text) or (self.other is not None and self.other.search(text)):
            return None
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            return None
        words = self.pattern.findall(text)
        if sum(map(len, words)) != len(text):  # the pattern leaves something out
            return None
        new = list(set(words).difference(self.known))
        if new and not self._learn(new):
            return None
        return np.fromiter(chain.from_iterable(map(self.known.__getitem__, words)), dtype=np.int32)

    def _learn(self, words: list[str]) -> bool:
        """Whether every word is a word by itself too."""
        if any(self.pattern.findall(w) != [w] for w in words):
            return False
        encoded = self.backend.encode_batch_fast(words, add_special_tokens=False)
        self.known.update((w, tuple(e.ids)) for w, e in zip(words, encoded, strict=True))
        return True


def words_of(backend: Any) -> Words | None:
    """The word lookup of a `tokenizers.Tokenizer`, or None where it is not byte-level BPE with one
    pattern.
    """
    about = json.loads(backend.to_str())
    model, normalizer, pre = about["model"], about["normalizer"], about["pre_tokenizer"]
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or (normalizer or {"type": "NFC"}).get("type") != "NFC"
        or pre is None
    ):
        return None
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    pattern = None
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            pattern = GPT2
        case [
            {"type": "Split", "pattern": {"Regex": found}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pattern = str(found)
    if pattern is None:
        return None
    added = about["added_tokens"]
    habits = ("single_word", "lstrip", "rstrip", "normalized")
    plain = {t["content"]: t["id"] for t in added if not any(t[h] for h in habits)}
    try:
        return Words(
            backend,
            pattern,
            normalizer is not None,
            plain,
            [t["content"] for t in added if t["content"] not in plain],
        )
    except regex.error:
        return None
