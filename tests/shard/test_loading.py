"""A checkpoint that one process reads for all: each has the weights, buffers and adapters of one
process alone, and those that read nothing have no memory for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loading_ranks
from cpu_sharding import on_ranks_of_their_own
from longfactory import sp
from longfactory.model import load
from longfactory.stages.tokens import TokenStage
from longfactory.testing import tiny_model
from longfactory.train.model import build_model
from small_runs import write_tokenizer

pytestmark = pytest.mark.processes

MiB = 2**20
FULL = {"finetuning_type": "full"}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}


def write(folder: Path, kind: str, **changes: Any) -> str:
    """A checkpoint in bf16, whose buffers are no zeros."""
    vocabulary = write_tokenizer(folder)
    model = tiny_model(kind, seed=1, vocab_size=vocabulary, **changes)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            buffer.copy_(torch.randn_like(buffer))
    model.bfloat16().save_pretrained(folder)
    return str(folder)


def alone(folder: str, keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same of one process that reads the files."""
    from transformers import TrainingArguments

    cfg = loading_ranks.config_of(folder, keys)
    args = TrainingArguments(output_dir=f"{folder}-out", use_cpu=True, report_to="none")
    torch.manual_seed(5)
    model, _, _ = build_model(
        cfg,
        load.load_config(cfg.model, 64),
        load.load_tokenizer(cfg.model),
        sp.SequenceParallel.create(1),
        args,
        TokenStage(),
        False,
    )
    state = set(model.state_dict())
    found = {name: p.detach() for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    return found | {f"in state: {n}": torch.tensor(n in state) for n, _ in model.named_buffers()}


@pytest.mark.parametrize(
    ("kind", "keys", "changes"),
    [
        ("llama", FULL, {"tie_word_embeddings": True}),
        ("glm4_moe", FULL, {}),
        ("glm4_moe", LORA, {}),
    ],
    ids=["tied", "buffers", "buffers and lora"],
)
def test_each_rank_has_what_one_process_has(
    kind: str, keys: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", kind, **changes)
    wanted = alone(folder, keys)
    ranks = on_ranks_of_their_own(2, 200, loading_ranks.on_a_rank, folder, keys)
    for found, _ in ranks:
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype, name
            assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("keys", [FULL, LORA], ids=["full", "lora"])
def test_one_rank_holds_the_weights(keys: dict[str, Any], tmp_path: Path) -> None:
    changes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    folder = write(tmp_path / "model", "llama", **changes)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 50 * MiB
    (_, reads), (_, receives) = on_ranks_of_their_own(2, 200, loading_ranks.on_a_rank, folder, keys)
    assert reads > 0.9 * size
    assert receives < 0.3 * size
