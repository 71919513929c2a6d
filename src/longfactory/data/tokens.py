"""Strings to token ids, many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from longfactory.data.errors import BadRow
from longfactory.data.template import Piece, Special
from longfactory.data.words import LONG, words_of

Ids = np.ndarray  # int32, one-dimensional

_PROBES = (
    "Hello, world",
    "\n",
    " a b\n\nc",
    "<|im_start|>user\nx",
    "«é» 漢字 🙂",
    "<s>[INST] x </s>",
)


def check_text(groups: Iterable[Sequence[Piece]]) -> None:
    """Raises BadRow for half of a character (a lone surrogate, which JSON can hold as `\\ud83d`): a
    text that was cut inside an emoji. No tokenizer takes it.
    """
    for group in groups:
        for piece in group:
            if not isinstance(piece, str) or piece.isascii():
                continue
            try:
                piece.encode()
            except UnicodeEncodeError as error:
                around = piece[max(error.start - 20, 0) : error.end + 20].encode(errors="replace")
                raise BadRow(
                    f"half of a character: {piece[error.start]!r} in {around.decode()!r}"
                ) from None


class PieceTokenizer:
    """Token ids of pieces, equal to `tokenizer.encode(piece, add_special_tokens=False)` for each of
    them.

    A fast tokenizer encodes a batch of strings at once, without the offsets that its usual call
    computes (about half the time).
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is not None:
            self.backend.no_truncation()
            self.backend.no_padding()
            expected = [tokenizer.encode(p, add_special_tokens=False) for p in _PROBES]
            if [
                e.ids
                for e in self.backend.encode_batch_fast(list(_PROBES), add_special_tokens=False)
            ] != expected:
                self.backend = None
        self.words = (
            None
            if self.backend is None or getattr(tokenizer, "split_special_tokens", False)
            else words_of(self.backend)
        )

    def strings(self, texts: Iterable[str]) -> dict[str, Ids]:
        """Ids of each different string."""
        out: dict[str, Ids] = {}
        rest: list[str] = []
        for text in dict.fromkeys(texts):
            ids = self.words.ids(text) if self.words is not None and len(text) >= LONG else None
            if ids is None:
                rest.append(text)
            else:
                out[text] = ids
        if self.backend is None:
            found = [self.tokenizer.encode(t, add_special_tokens=False) for t in rest]
        else:
            found = [e.ids for e in self.backend.encode_batch_fast(rest, add_special_tokens=False)]
        out.update((t, np.array(ids, dtype=np.int32)) for t, ids in zip(rest, found, strict=True))
        return out

    def special(self, piece: Special) -> list[int]:
        """The id of a special token; nothing where the tokenizer has no bos or eos.

        Raises:
            ValueError: the tokenizer lacks a token that the template names.
        """
        t = self.tokenizer
        if piece.kind == "token":
            found = t.convert_tokens_to_ids(piece.text)
            if found is None or found == t.unk_token_id:
                raise ValueError(
                    f"The template needs the token {piece.text!r}, which this tokenizer lacks."
                    " Choose the model's template."
                )
        else:
            found = t.bos_token_id if piece.kind == "bos" else t.eos_token_id
        return [] if found is None else [found]

    def pieces(self, groups: Sequence[Sequence[Piece]]) -> list[Ids]:
        """[groups of pieces] -> the ids of each group, its pieces laid end to end."""
        texts = self.strings(p for g in groups for p in g if isinstance(p, str) and p)
        empty = np.zeros(0, dtype=np.int32)
        specials: dict[Special, Ids] = {}
        out = []
        for group in groups:
            parts = []
            for p in group:
                if isinstance(p, Special):
                    if p not in specials:
                        specials[p] = np.array(self.special(p), dtype=np.int32)
                    parts.append(specials[p])
                elif p:
                    parts.append(texts[p])
            if len(parts) == 1:
                out.append(parts[0])
            else:
                out.append(np.concatenate([empty, *parts]))
        return out
