"""Token ids and labels equal LLaMA-Factory 0.9.5's, template by template, over a generated grid of
conversations and options.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import lf_oracle
import pytest

from data_arguments import make_args
from embedded_model import needs_embedded_model
from longfactory.data.module import load_datasets
from longfactory.data.row import IGNORE
from longfactory.data.template_table import TABLE
from longfactory.data.templates import get_template
from longfactory.model.load import resolve

ORACLE = lf_oracle.Oracle()
# The families of the promise get the wide grid in every run; all others get it with -m slow.
FAMILIES = [
    *(
        "qwen",
        "qwen3",
        "qwen3_nothink",
        "qwen3_5",
        "qwen3_5_nothink",
        "qwen2_vl",
        "llama2",
        "llama3",
        "llama4",
        "mistral",
        "ministral",
    ),
    *(
        "gemma",
        "gemma2",
        "gemma3",
        "gemma4",
        "phi",
        "phi4",
        "phi4_mini",
        "deepseek",
        "deepseek3",
        "deepseekr1",
        "glm4",
        "glm4_moe",
        "glm4_7",
    ),
    *(
        "glmz1",
        "yi",
        "chatml",
        "vicuna",
        "zephyr",
        "alpaca",
        "default",
        "empty",
        "fewshot",
        "seed_oss",
        "minimax1",
        "minimax2",
        "lfm2",
    ),
    *("bailing_v2", "chatglm3", "gpt_oss", "smollm2"),
]

TOOLS = json.dumps(
    [
        {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {
                        "type": "string",
                        "description": "Its name",
                        "enum": ["Paris", "Köln"],
                    },
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
            "response": {"type": "object", "description": "a forecast"},
        },
        {
            "type": "function",
            "function": {
                "name": "stop",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    ]
)
TEXTS = [
    "Hello, how are you?",
    "\nIt begins with a newline and ends with one\n",
    " a blank in front",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Grüße 漢字 🙂 and {{content}} in braces, 'quoted' and \"double\"",
    "it is what it is",
    "<|im_end|> a special token <|user|> in the text",
]
CALL = json.dumps(
    {
        "name": "get_weather",
        "arguments": {
            "city": "Köln",
            "days": [1, 2],
            "deep": {"b": None, "a": True},
            "text": 'a "b"',
        },
    }
)
CALLS = json.dumps(
    [{"name": "stop", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Paris"}}]
)


def thought(rng: random.Random, words: tuple[str, str]) -> str:
    return words[0] + rng.choice(["", "let me see", "one\ntwo"]) + words[1]


def conversation(
    rng: random.Random, words: tuple[str, str], parallel_calls: bool, thought_before_call: bool
) -> dict[str, Any]:
    """A random sharegpt row, of one to four turns."""
    messages = []
    tools = rng.random() < 0.4
    asked_by = "human"
    for _ in range(rng.randint(1, 4)):
        messages.append({"from": asked_by, "value": rng.choice(TEXTS)})
        asked_by = "human"
        before = thought(rng, words) if rng.random() < 0.35 else ""
        if tools and rng.random() < 0.4:
            content = rng.choice([CALL, CALLS] if parallel_calls else [CALL])
            messages.append(
                {
                    "from": "function_call",
                    "value": (before if thought_before_call else "") + content,
                }
            )
            asked_by = "observation"
        else:
            messages.append({"from": "gpt", "value": before + rng.choice(TEXTS)})
    row: dict[str, Any] = {"conversations": messages}
    row["system"] = rng.choice(["", "Answer in one word.", "You are terse.\n"])
    row["tools"] = rng.choice([TOOLS, TOOLS, "[]"]) if tools else ""
    return row


INFO = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"cutoff_len": 120},
    {"cutoff_len": 33, "default_system": "Another system."},
    {"mask_history": True, "cutoff_len": 90},
    {"mask_history": True, "preserve_thinking": True},
    {"enable_thinking": False, "cutoff_len": 300},
    {"enable_thinking": None, "mask_history": True},
    {"train_on_prompt": True, "cutoff_len": 200},
]


def rows_for(name: str, n: int) -> list[dict[str, Any]]:
    """Rows that the wheel itself can encode with this template (its Llama-2-like templates take no
    thought before a call).
    """
    rng = random.Random(name)
    table = ORACLE.lf.template.TEMPLATES[name]
    parallel = table.format_function.tool_format != "glm4"
    before_call = type(table).__name__ != "Llama2Template"
    return [conversation(rng, table.thought_words, parallel, before_call) for _ in range(n)]


def ours(
    stage: str, rows: list[dict], info: dict, tokenizer: Any, args: Any, write_data: Any
) -> Any:
    args.dataset_dir, args.dataset = str(write_data(d=(info, rows))), "d"
    template = get_template(args, tokenizer)
    return load_datasets(args, stage=stage, tokenizer=tokenizer, template=template, seed=0).train


def check_sft(name: str, tokenizer: Any, options: dict, rows: list[dict], write_data: Any) -> None:
    efficient = ORACLE.lf.template.TEMPLATES[name].efficient_eos
    if options.get("train_on_prompt") and efficient:
        return
    theirs_tokenizer, our_tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    args = make_args(template=name, **options)
    expected = ORACLE.encode("sft", rows, INFO, theirs_tokenizer, args)
    data = ours("sft", rows, INFO, our_tokenizer, args, write_data)
    assert our_tokenizer.eos_token_id == theirs_tokenizer.eos_token_id
    assert our_tokenizer.pad_token_id == theirs_tokenizer.pad_token_id
    assert len(our_tokenizer) == len(theirs_tokenizer)
    assert len(data) == len(rows)
    for i, (ids, labels) in enumerate(zip(expected["input_ids"], expected["labels"], strict=True)):
        (document,) = data[i]
        assert list(document.input_ids) == ids, (name, options, i)
        # where a turn's source is cut to nothing, the wheel writes one label too many
        if len(labels) == len(ids):
            assert list(document.labels) == labels, (name, options, i)
        assert data.lengths[i] == len(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_sft(name: str, tokenizers: dict[str, Any], write_data: Any) -> None:
    rows = rows_for(name, 8)
    for i, options in enumerate(OPTIONS):
        check_sft(
            name, tokenizers["byte" if (len(name) + i) % 2 else "meta"], options, rows, write_data
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "meta"])
@pytest.mark.parametrize("name", ORACLE.names)
def test_sft_of_every_template(
    name: str, kind: str, tokenizers: dict[str, Any], write_data: Any
) -> None:
    rows = rows_for(name, 30)
    for options in OPTIONS:
        check_sft(name, tokenizers[kind], options, rows, write_data)


def test_every_template_of_the_wheel_is_here() -> None:
    assert set(ORACLE.names) <= set(TABLE)


@pytest.mark.parametrize("name", ["qwen", "llama3", "glm4", "deepseekr1", "mistral"])
def test_tool_format(name: str, tokenizers: dict[str, Any], write_data: Any) -> None:
    rows = rows_for("llama2", 12)
    for form in ("default", "llama3", "mistral", "qwen3_5"):
        check_sft(
            name, tokenizers["byte"], {"tool_format": form, "default_system": ""}, rows, write_data
        )


PAIRS = {
    "ranking": True,
    "columns": {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "s", "history": "h"},
}


def pair_rows(name: str, n: int) -> list[dict[str, Any]]:
    rng = random.Random(name)
    words = ORACLE.lf.template.TEMPLATES[name].thought_words
    rows: list[dict[str, Any]] = []
    for _ in range(n):
        history = [
            [rng.choice(TEXTS), thought(rng, words) + rng.choice(TEXTS)]
            for _ in range(rng.choice([0, 0, 1, 2]))
        ]
        good, bad = rng.sample(TEXTS, 2)
        good, bad = (
            (thought(rng, words) if rng.random() < 0.4 else "") + text for text in (good, bad)
        )
        rows.append(
            {
                "q": rng.choice(TEXTS),
                "good": good,
                "bad": bad,
                "s": rng.choice(["", "Be brief."]),
                "h": history,
            }
        )
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs(name: str, tokenizers: dict[str, Any], write_data: Any) -> None:
    for options in (
        {},
        {"cutoff_len": 70},
        {"cutoff_len": 24, "enable_thinking": False},
        {"enable_thinking": None, "preserve_thinking": True},
    ):
        rows = pair_rows(name, 10)
        args = make_args(template=name, **options)
        expected = ORACLE.encode("rm", rows, PAIRS, copy.deepcopy(tokenizers["meta"]), args)
        data = ours("dpo", rows, PAIRS, copy.deepcopy(tokenizers["meta"]), args, write_data)
        for i in range(len(rows)):
            for document, role in zip(data[i], ("chosen", "rejected"), strict=True):
                assert document.role == role
                assert list(document.input_ids) == expected[f"{role}_input_ids"][i], (
                    name,
                    options,
                    i,
                )
                assert list(document.labels) == expected[f"{role}_labels"][i]
            assert data.lengths[i] == sum(len(d.input_ids) for d in data[i])


KTO = {"columns": {"prompt": "q", "response": "a", "kto_tag": "tag"}}


@pytest.mark.parametrize("name", FAMILIES)
def test_kto(name: str, tokenizers: dict[str, Any], write_data: Any) -> None:
    for options in (
        {},
        {"cutoff_len": 40},
        {"enable_thinking": False},
        {"enable_thinking": None, "cutoff_len": 25},
    ):
        rng = random.Random(name)
        rows = [
            {"q": r["q"], "a": r["good"], "tag": rng.random() < 0.5} for r in pair_rows(name, 12)
        ]
        args = make_args(template=name, **options)
        expected = ORACLE.encode("kto", rows, KTO, copy.deepcopy(tokenizers["byte"]), args)
        data = ours("kto", rows, KTO, copy.deepcopy(tokenizers["byte"]), args, write_data)
        for i, row in enumerate(rows):
            target, kl = data[i]
            assert (target.role, kl.role) == ("chosen" if row["tag"] else "rejected", "kl")
            assert list(target.input_ids) == expected["input_ids"][i], (name, options, i)
            assert list(target.labels) == expected["labels"][i]
            assert list(kl.input_ids) == expected["kl_input_ids"][i]
            assert list(kl.labels) == expected["kl_labels"][i]
            assert data.lengths[i] == len(target.input_ids) + len(kl.input_ids)


@pytest.mark.parametrize("name", ["qwen", "llama3", "gemma", "default"])
@pytest.mark.parametrize("kind", ["byte", "meta"])
@pytest.mark.parametrize("cutoff", [2048, 20])
def test_unpacked_pretraining(
    name: str, kind: str, cutoff: int, tokenizers: dict[str, Any], write_data: Any
) -> None:
    rows = [{"text": t} for t in TEXTS]
    info = {"columns": {"prompt": "text"}}
    args = make_args(template=name, packing=False, cutoff_len=cutoff)
    expected = ORACLE.encode("pt", rows, info, copy.deepcopy(tokenizers[kind]), args)
    data = ours("pt", rows, info, copy.deepcopy(tokenizers[kind]), args, write_data)
    assert [list(data[i][0].input_ids) for i in range(len(data))] == expected["input_ids"]
    assert [list(data[i][0].labels) for i in range(len(data))] == expected["input_ids"]


def test_openai_rows_with_the_quirks_of_0_9_5(tokenizers: dict[str, Any], write_data: Any) -> None:
    """The system texts that the wheel adds to openai rows: kept with `openai_quirks`, left out
    otherwise.
    """
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": json.loads(CALL)}],
    }
    result = {"role": "tool", "content": "sunny"}
    base = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Which city?"},
    ]
    rows = [
        {"messages": base, "tools": None},
        {"messages": [{"role": "system", "content": "Be brief."}, *base], "tools": None},
        {"messages": [{"role": "system", "content": "detailed thinking on"}, *base], "tools": None},
        {
            "messages": [
                *base,
                base[0],
                call,
                result,
                result,
                {"role": "assistant", "content": "Sun."},
            ],
            "tools": json.loads(TOOLS),
        },
        {
            "messages": [{"role": "system", "content": "Be brief."}, *base],
            "tools": json.loads(TOOLS),
        },
    ]
    tags = ("role", "content", "user", "assistant", "tool", "function", "system")
    keys = (
        "role_tag",
        "content_tag",
        "user_tag",
        "assistant_tag",
        "observation_tag",
        "function_tag",
        "system_tag",
    )
    info = {
        "formatting": "openai",
        "columns": {"messages": "messages", "tools": "tools"},
        "tags": dict(zip(keys, tags, strict=True)),
    }
    args = make_args(template="qwen")
    expected = ORACLE.encode("sft", rows, info, copy.deepcopy(tokenizers["byte"]), args)
    data = ours(
        "sft",
        rows,
        info | {"openai_quirks": True},
        copy.deepcopy(tokenizers["byte"]),
        args,
        write_data,
    )
    assert [list(data[i][0].input_ids) for i in range(5)] == expected["input_ids"]
    assert [list(data[i][0].labels) for i in range(5)] == expected["labels"]
    tokenizer = copy.deepcopy(tokenizers["byte"])
    clean = ours("sft", rows, info, tokenizer, make_args(template="qwen"), write_data)
    assert "detailed thinking off" not in tokenizer.decode(clean[0][0].input_ids)
    assert list(clean[2][0].input_ids) == expected["input_ids"][2]
    assert any(label != IGNORE for label in clean[3][0].labels)


@pytest.mark.slow
@needs_embedded_model
@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_a_real_tokenizer_on_the_data_of_the_project(name: str, write_data: Any) -> None:
    """SmolLM2's tokenizer on long documents: the word lookup for long texts takes part."""
    from pathlib import Path

    from transformers import AutoTokenizer

    folder, words = resolve("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, **words)
    rows = json.loads((Path(__file__).parents[2] / "data" / "manual_sft.json").read_text())[:16]
    rows.append(
        {
            "instruction": "\n\n".join(r["instruction"] for r in rows),
            "input": "?",
            "output": "All of it.",
        }
    )
    for cutoff in (100_000, 1500):
        args = make_args(template=name, cutoff_len=cutoff)
        expected = ORACLE.encode("sft", rows, {}, copy.deepcopy(tokenizer), args)
        data = ours("sft", rows, {}, copy.deepcopy(tokenizer), args, write_data)
        assert [list(data[i][0].input_ids) for i in range(len(rows))] == expected["input_ids"]
        assert [list(data[i][0].labels) for i in range(len(rows))] == expected["labels"]
