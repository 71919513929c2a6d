"""Small tokenizers, arguments, and data sets on disk for the tests of the data layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
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


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {"byte": byte_level(), "meta": metaspace()}


@pytest.fixture
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of one's own."""
    return copy.deepcopy(tokenizers["byte"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("LONGFACTORY_CACHE", str(path))
    return path


def make_args(**changes: Any) -> SimpleNamespace:
    """Data arguments with their defaults."""
    values: dict[str, Any] = {
        "dataset": None,
        "eval_dataset": None,
        "dataset_dir": "data",
        "media_dir": None,
        "template": "qwen",
        "cutoff_len": 2048,
        "train_on_prompt": False,
        "mask_history": False,
        "streaming": False,
        "buffer_size": 16384,
        "mix_strategy": "concat",
        "interleave_probs": None,
        "overwrite_cache": False,
        "preprocessing_batch_size": 1000,
        "preprocessing_num_workers": None,
        "max_samples": None,
        "val_size": 0.0,
        "packing": None,
        "neat_packing": False,
        "tool_format": None,
        "default_system": None,
        "enable_thinking": True,
        "preserve_thinking": False,
        "equal_pairs": False,
        "do_predict": False,
        "do_eval": False,
        "tokenized_path": None,
        "cutoff_strategy": "llamafactory",
        "on_bad_row": "skip",
        "template_compat": None,
        "pref_share_prompt": False,
    }
    others = {"eval_on_each_dataset", "data_shared_file_system", "media_allow", "crop_to_patches"}
    others |= {"image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "video_fps"}
    others |= {"video_max_pixels", "video_min_pixels", "video_maxlen"}
    unknown = changes.keys() - values.keys() - others
    assert not unknown, unknown
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a dataset_info.json and its files: name=(entry, rows or bytes)."""

    def write(**sets: tuple[dict[str, Any], Any]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        info = {}
        for name, (entry, rows) in sets.items():
            entry = {"file_name": f"{name}.json"} | entry
            info[name] = entry
            path = folder / entry["file_name"]
            if isinstance(rows, bytes):
                path.write_bytes(rows)
            elif path.suffix == ".jsonl":
                path.write_text(
                    "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
                    encoding="utf-8",
                )
            elif rows is not None:
                path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        return folder

    return write
