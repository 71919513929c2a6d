"""What is generated in tests of predictions: documents, a tokenizer and greedy settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from longfactory.data.row import IGNORE, TokenizedDocument

GREEDY = SimpleNamespace(
    do_sample=False, temperature=1.0, top_p=1.0, top_k=50, num_beams=1, max_length=64, max_new_tokens=6, repetition_penalty=1.0,
    length_penalty=1.0, skip_special_tokens=True,
)  # fmt: skip


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}},
            unk_token="<pad>",
        )
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


DOCUMENTS = [
    TokenizedDocument(
        [3 + i, 4, 5, *range(20, 20 + i), 9, 2], [IGNORE] * (3 + i) + [9, 2], sample=i
    )
    for i in range(5)
]  # prompts of 3 to 7 tokens
