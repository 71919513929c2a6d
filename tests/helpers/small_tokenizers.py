"""Small tokenizers, trained on a few sentences."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    (
        "The quick brown fox jumps over the lazy dog. A row is one flat sequence of tokens made of"
        " documents.\n\nHello, how are you?"
    ),
    (
        'def f(x):\n    return x + 1\n\nprint(f(41))  # forty-two\n{"name": "get_weather",'
        ' "arguments": {"city": "Paris"}}'
    ),
    (
        "Question: what is it? Answer: it is what it is. System user assistant human tool"
        " observation think </think> response"
    ),
    "Grüße aus Köln, 漢字とかな, данные и слова, 🙂🙃 and so on and so forth, again and again.",
] * 4
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<|user|>",
]
SPECIAL += ["[gMASK]", "sop", "<|system|>", "<|assistant|>", "<|observation|>", "<sep>"]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2: eos, no bos, no pad."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>")


def metaspace() -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece as Llama 2 has it: bos, eos, a blank in front of every text,
    unknown characters as <unk>.
    """
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *SPECIAL], show_progress=False
    )
    t.train_from_iterator(["▁" + c.replace(" ", "▁") for c in CORPUS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
