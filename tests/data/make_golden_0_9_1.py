"""Writes golden_0_9_1.json: the tokens of LLaMA-Factory 0.9.1 for a few conversations, one token a
character.

pip download llamafactory==0.9.1 --no-deps && unzip llamafactory-0.9.1-*.whl
python tests/data/make_golden_0_9_1.py ./llamafactory
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CALL = '{"name": "f", "arguments": {"x": 1}}'
CASES: list[dict[str, Any]] = [
    {"messages": [["user", "Q1"], ["assistant", "A1"]]},
    {
        "messages": [
            ["user", "Q1"],
            ["assistant", "A1"],
            ["user", "Q2"],
            ["assistant", "A2"],
            ["user", "Q3"],
            ["assistant", "A3"],
        ]
    },
    {
        "messages": [["user", "Q1"], ["assistant", "A1"], ["user", "Q2"], ["assistant", "A2"]],
        "system": "S",
    },
    {"messages": [["user", "Q1"], ["function", CALL], ["observation", "O"], ["assistant", "A2"]]},
    {
        "messages": [
            ["user", "Q1" * 20],
            ["assistant", "A1" * 9],
            ["user", "Q2" * 9],
            ["assistant", "A2" * 9],
        ],
        "cutoff_len": 60,
    },
    {
        "messages": [
            ["user", "Q1" * 20],
            ["assistant", "A1" * 9],
            ["user", "Q2" * 9],
            ["assistant", "A2" * 9],
        ],
        "mask_history": True,
    },
]
NAMES = [
    *(
        "alpaca",
        "chatml",
        "deepseek",
        "deepseekcoder",
        "default",
        "empty",
        "exaone",
        "falcon",
        "fewshot",
        "gemma",
        "llama2",
        "llama2_zh",
    ),
    *(
        "llama3",
        "mistral",
        "openchat",
        "phi",
        "qwen",
        "qwen2_vl",
        "solar",
        "vicuna",
        "yi",
        "zephyr",
    ),
]
SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
]


def characters() -> PreTrainedTokenizerFast:
    """One token a character; special tokens are known, other characters are <unk>."""
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127)), "｜"])}
    t = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    t.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def main(root: Path) -> None:
    modules = _load(root)
    out = []
    for name in NAMES:
        for number, case in enumerate(CASES):
            tokenizer = characters()
            add = tokenizer.add_special_tokens
            # transformers 5 has another name for this argument.
            tokenizer.add_special_tokens = lambda tokens, add=add, **_: add(tokens)
            args = SimpleNamespace(template=name, train_on_prompt=False, tool_format=None)
            template = modules.template.get_template_and_fix_tokenizer(tokenizer, args)
            messages = [{"role": r, "content": c} for r, c in case["messages"]]
            ids, labels = modules.supervised._encode_supervised_example(
                *(
                    messages[:-1],
                    messages[-1:],
                    case.get("system", ""),
                    "",
                    [],
                    [],
                    template,
                    tokenizer,
                    None,
                ),
                *(case.get("cutoff_len", 2048), False, case.get("mask_history", False)),
            )
            out.append({"template": name, "case": number, "ids": ids, "labels": labels})
    text = "[\n" + ",\n".join(json.dumps(o, separators=(",", ":")) for o in out) + "\n]\n"
    Path(__file__).with_name("golden_0_9_1.json").write_text(text)


def _load(root: Path) -> Any:
    import importlib

    import lf_oracle

    for package in ("", ".extras", ".data", ".data.processors"):
        module: Any = type(sys)("llamafactory" + package)
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules["llamafactory" + package] = module
    plugin: Any = type(sys)("llamafactory.data.mm_plugin")
    plugin.BasePlugin = lf_oracle._TextOnly
    plugin.get_mm_plugin = lambda name, **kwargs: lf_oracle._TextOnly()
    sys.modules["llamafactory.data.mm_plugin"] = plugin
    return SimpleNamespace(
        template=importlib.import_module("llamafactory.data.template"),
        supervised=importlib.import_module("llamafactory.data.processors.supervised"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
