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


def adapter(folder: str, path: Path, start: Any) -> str:
    """LoRA on a checkpoint, `start` its init_lora_weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(path)
    return str(path)


def alone(folder: str, keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same of one process that reads the files."""
    from transformers import TrainingArguments

    cfg = loading_ranks.config_of(folder, keys)
    args = TrainingArguments(
        output_dir=f"{folder}-out", use_cpu=True, do_train=True, report_to="none"
    )
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
        assert any("lora_A" in name for name in found) == (keys is LORA)
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype, name
            assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize(
    ("start", "keys"),
    [(True, {"create_new_adapter": True, "use_dora": True}), ("pissa_niter_4", {})],
    ids=["DoRA beside a merged adapter", "PiSSA of before"],
)
def test_what_a_rank_does_not_hold_ends_no_run(
    start: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Memory that nothing was written to, which may hold NaN, is not taken for damaged weights and
    not decomposed.
    """
    folder = write(tmp_path / "model", "llama")
    keys = LORA | keys | {"adapter_name_or_path": adapter(folder, tmp_path / "adapter", start)}
    wanted = alone(folder, keys)
    ranks = on_ranks_of_their_own(2, 200, loading_ranks.on_a_rank, folder, keys, True)
    for found, _ in ranks:
        assert found.keys() == wanted.keys()
        assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("keys", [FULL, LORA], ids=["full", "lora"])
def test_one_rank_holds_the_weights(keys: dict[str, Any], tmp_path: Path) -> None:
    changes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    folder = write(tmp_path / "model", "llama", **changes)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 50 * MiB
    (_, reads), (_, receives) = on_ranks_of_their_own(2, 200, loading_ranks.on_a_rank, folder, keys)
    assert reads > 0.9 * size
    assert receives < 0.3 * size


def test_what_the_reading_rank_refuses_ends_every_rank(tmp_path: Path) -> None:
    """Before a collective, in which the others would wait for it."""
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    folders = {}
    for fault in ("shape", "missing", "damaged", "no numbers", "adapter"):
        folders[fault] = write(tmp_path / fault, "llama")
        file = tmp_path / fault / "model.safetensors"
        weights = load_file(file)
        if fault == "shape":
            weights[name] = weights[name][:-1].clone()
        elif fault == "missing":
            del weights[name]
        elif fault == "no numbers":
            weights[name][0, 0] = float("nan")
        if fault == "damaged":
            file.write_bytes(file.read_bytes()[:-100])
        else:
            save_file(weights, file, metadata={"format": "pt"})
    tuned = adapter(folders["adapter"], tmp_path / "tuned", True)
    file = Path(tuned) / "adapter_model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(file).items()}, file)

    cases = [(folder, FULL) for folder in folders.values()]
    cases[-1] = (folders["adapter"], LORA | {"adapter_name_or_path": tuned})
    reads, receives = on_ranks_of_their_own(2, 100, loading_ranks.refusals, cases)
    words = ("could not be loaded", f"no weights for {name}", "could not be loaded", name, "NaN")
    for said, told, word in zip(reads, receives, words, strict=True):
        assert said.startswith("UserError: ") and word in said
        assert told in (said, said.replace("UserError: ", "UserError: Process 0: "))
