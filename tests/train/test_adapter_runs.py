"""Whole runs of every kind of adapter: what two processes that share the sequences save is what one
saves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from longfactory.testing import tiny_model
from small_runs import LORA, STEPS, home, steps, text, train, write_tokenizer

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"pissa_init": True},
    "pissa, randomised": {"pissa_init": True, "pissa_iter": 4},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "all of them": {
        "use_dora": True,
        "use_rslora": True,
        "loraplus_lr_ratio": 4.0,
        "lora_target": "q_proj,down_proj,lm_head",
    },
    "embedding": {"lora_target": "q_proj,embed_tokens"},
    "head by itself": {"lora_target": "q_proj", "additional_target": "lm_head"},
}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(home: Path) -> list[dict[str, float]]:
    return steps(train(home, "plain1", 1, **LORA))


MODES = ("zigzag-ring", "ulysses")
# By default each kind once.
GRID = [
    pytest.param(kind, mode, marks=[] if (i + j) % 2 else [pytest.mark.slow])
    for i, kind in enumerate(KINDS)
    for j, mode in enumerate(MODES)
]


@pytest.mark.parametrize(("kind", "mode"), GRID)
def test_two_processes_train_what_one_trains(
    home: Path, plain: list[dict[str, float]], kind: str, mode: str
) -> None:
    changes = {**LORA, **KINDS[kind]}
    folders = [f"{kind}_{mode}_{n}" for n in (1, 2)]
    one = steps(train(home, folders[0], 1, **changes))
    two = steps(train(home, folders[1], 2, **changes, sequence_parallel_mode=mode))
    assert len(one) == STEPS and one[-1]["loss"] < one[0]["loss"]
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=2e-5), key
    a, b = (saved(home / f) for f in folders)
    assert a.keys() == b.keys() and sum("lora_B" in n for n in a) >= 2
    for name, x in a.items():
        torch.testing.assert_close(
            b[name], x, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    if kind != "plain":  # the key does something: another run than plain LoRA's
        assert max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(one, plain, strict=True)) > 1e-4


@pytest.fixture(scope="module")
def experts(home: Path) -> Path:
    """Tiny mixtures of experts, and pairs of answers."""
    for family in ("qwen3_moe", "gpt_oss"):
        vocabulary = write_tokenizer(home / family)
        tiny_model(family, vocab_size=vocabulary).save_pretrained(home / family)
    random.seed(0)
    pairs = [
        {"instruction": text(12 + i), "chosen": text(20 - i), "rejected": text(9 + i)}
        for i in range(12)
    ]
    (home / "pairs.json").write_text(json.dumps(pairs))
    judged = [
        {"prompt": text(12 + i), "answer": text(15 - i), "label": i % 3 > 0} for i in range(12)
    ]
    (home / "judged.json").write_text(json.dumps(judged))
    info: dict[str, Any] = {
        "talks": {"file_name": "talks.json"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "judged": {
            "file_name": "judged.json",
            "columns": {"prompt": "prompt", "response": "answer", "kto_tag": "label"},
        },
    }
    (home / "dataset_info.json").write_text(json.dumps(info))
    return home


DPO = {"stage": "dpo", "dataset": "pairs", "packing": None}
ON_EXPERTS = {**LORA, "lora_target": "all", "moe_aux_loss_coef": 0.5}
EXPERT_RUNS: dict[str, dict[str, Any]] = {
    "sft": {**ON_EXPERTS},
    "dpo": {**ON_EXPERTS, **DPO, "train_routers": True},
    "full": {"moe_aux_loss_coef": 0.5},
    "dpo, full": {"moe_aux_loss_coef": 0.5, **DPO},
    "rm": {**ON_EXPERTS, **DPO, "stage": "rm"},
    "kto": {**ON_EXPERTS, **DPO, "stage": "kto", "dataset": "judged"},
}
EXPERT_GRID = [
    pytest.param(
        kind, family, marks=[] if (kind, family) == ("dpo", "gpt_oss") else [pytest.mark.slow]
    )
    for kind in EXPERT_RUNS
    for family in ("qwen3_moe", "gpt_oss")
]


@pytest.mark.parametrize(("kind", "family"), EXPERT_GRID)
def test_two_processes_train_the_experts_that_one_trains(
    experts: Path, kind: str, family: str
) -> None:
    changes = {**EXPERT_RUNS[kind], "model_name_or_path": experts / family}
    folders = [f"{kind}_{family}_{n}" for n in (1, 2)]
    one = steps(train(experts, folders[0], 1, **changes))
    two = steps(train(experts, folders[1], 2, **changes, sequence_parallel_mode="ulysses"))
    assert len(one) == STEPS
    for key in ("loss", "grad_norm", "router_aux_loss", "expert_max_load", "expert_entropy"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=2e-5), key
    assert all(h["expert_max_load"] >= 1 and h["router_aux_loss"] > 1 for h in one)
    name = "adapter_model.safetensors" if "full" not in kind else "model.safetensors"
    a, b = (load_file(experts / f / name) for f in folders)
    assert a.keys() == b.keys()
    if "full" not in kind:
        assert sum("experts" in n for n in a) == 2 * 2 * 2  # A and B, two parameters, two layers
    for n, x in a.items():
        torch.testing.assert_close(b[n], x, rtol=1e-4, atol=2e-6, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(("model", "rows"), [("larger", 323), ("model", 320)])
def test_new_tokens_are_trained_beside_an_adapter(home: Path, model: str, rows: int) -> None:
    """As in LLaMA-Factory, without resize_vocab, and also where the embedding has rows to spare for
    them, as Qwen's: those rows mean nothing yet.
    """
    data = [{"instruction": text(9), "output": f"{text(9)}<new> <newer>"} for _ in range(8)]
    (home / "new.json").write_text(json.dumps(data))
    train(
        home,
        f"new_{model}",
        1,
        **{**LORA, "lora_target": "q_proj", "model_name_or_path": home / model},
        dataset=str(home / "new.json"),
        add_special_tokens="<new>",
        add_tokens="<newer>",
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / f"new_{model}")
    ids = tokenizer.convert_tokens_to_ids(["<new>", "<newer>"])
    weights = saved(home / f"new_{model}")
    before = load_file(home / model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        trained = weights[f"base_model.model.{name}"]
        assert len(trained) == rows
        old = before[name]
        if model == "larger":
            assert (trained[ids] - old[ids]).abs().max() > 1e-3
        assert (trained[: len(old)][:256] - old[:256]).abs().max() > 1e-3
