"""Checkpoints as they are published in eight bits (FP8 with a scale for each block, as DeepSeek's)
and in four (MXFP4, as gpt-oss's): they are read as ordinary numbers, trained, and saved as such.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import optimizer_worker
from cpu_sharding import on_ranks_of_their_own
from longfactory.model.load import widened
from longfactory.testing import tiny_model
from small_runs import LORA, home, steps, train, write_tokenizer

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture

BLOCK, MOST = 32, 448.0
STORED = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}


def write_eight_bits(model: Any, folder: Path, whole: Path, block: int) -> None:
    """A model whose linear weights are FP8 in blocks into `folder`, and into `whole` what they
    mean.
    """
    for place in (folder, whole):
        model.save_pretrained(place)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.endswith("proj.weight"):
            rows, columns = (n // block for n in weight.shape)
            blocks = weight.reshape(rows, block, columns, block)  # [O, I] -> [O/B, B, I/B, B]
            scale = blocks.abs().amax((1, 3)) / MOST
            eight = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name] = eight.reshape(weight.shape)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = (eight.float() * scale[:, None, :, None]).reshape(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**STORED, "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def published(home: Path) -> Path:
    """A tiny model whose linear weights are eight bits; beside it, in `whole`, what they mean."""
    folder, whole = home / "published", home / "whole"
    for place in (folder, whole):
        size = write_tokenizer(place)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = tiny_model("llama", seed=0, vocab_size=size, tie_word_embeddings=False, **sizes)
    write_eight_bits(model, folder, whole, BLOCK)
    return folder


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_it_trains_as_what_it_means(home: Path, published: Path, changes: dict[str, Any]) -> None:
    name = "lora" if changes else "full"
    runs = {
        "one": (published, 1),
        "two": (published, 2),
        "meant": (home / "whole", 1),
    }
    logs = {
        key: steps(train(home, f"{name}_{key}", size, model_name_or_path=folder, **changes))
        for key, (folder, size) in runs.items()
    }
    for other in ("two", "meant"):
        for key in ("loss", "grad_norm"):
            found = [h[key] for h in logs[other]]
            assert found == pytest.approx([h[key] for h in logs["one"]], rel=1e-4), (other, key)
    assert logs["one"][0]["loss"] != logs["one"][-1]["loss"]
    if changes:
        return
    saved = home / "full_one"
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    weights, meant = (load_file(p / "model.safetensors") for p in (saved, home / "full_meant"))
    assert weights.keys() == meant.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, meant[key], rtol=1e-5, atol=1e-6)


FOUR_BITS = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
"""The numbers of MXFP4 whose sign bit is 0."""


def write_four_bits(folder: Path, whole: Path) -> None:
    """A tiny gpt-oss whose experts are MXFP4, 32 numbers with one power of two; beside it what they
    mean.
    """
    for place in (folder, whole):
        size = write_tokenizer(place)
    widths = {"hidden_size": 64, "intermediate_size": 32}
    model = tiny_model("gpt_oss", seed=0, vocab_size=size, tie_word_embeddings=False, **widths)
    for place in (folder, whole):
        model.save_pretrained(place)
    draw = torch.Generator().manual_seed(0)
    table = torch.tensor([*FOUR_BITS, *(-x for x in FOUR_BITS)])
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, width, out = weight.shape
        shape = (experts, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(119, 124, shape, generator=draw, dtype=torch.uint8)
        # two numbers in a byte, the first in its lower half: [E, O, W/32, 16] -> [E, O, W/32, 32]
        numbers = table[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
        numbers = numbers * torch.exp2(scales.float() - 127)[..., None]
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = numbers.flatten(-2).transpose(1, 2).contiguous()  # [E, O, W] -> [E, W, O]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow), LORA], ids=["full", "lora"]
)
def test_mxfp4_trains_as_what_it_means(home: Path, changes: dict[str, Any]) -> None:
    write_four_bits(home / "four", home / "four meant")
    name = "four lora" if changes else "four full"
    folders = {"one": ("four", 1), "two": ("four", 2), "meant": ("four meant", 1)}
    logs = {
        key: steps(train(home, f"{name} {key}", n, model_name_or_path=home / folder, **changes))
        for key, (folder, n) in folders.items()
    }
    assert logs["one"][0]["loss"] != logs["one"][-1]["loss"]
    for other in ("two", "meant"):
        for key in ("loss", "grad_norm"):
            found = [h[key] for h in logs[other]]
            assert found == pytest.approx([h[key] for h in logs["one"]], rel=1e-4), (other, key)


@pytest.mark.slow
def test_fsdp2_trains_them_as_one_process(tmp_path: Path) -> None:
    """Also where the first process alone reads the files, which a run chooses."""
    write_eight_bits(optimizer_worker.model(), tmp_path / "stored", tmp_path / "meant", 2)
    before = optimizer_worker.loaded(str(tmp_path / "meant")).state_dict()
    keys: dict[str, Any] = {"learning_rate": 0.02}
    alone = optimizer_worker.train(keys, 1, "none", base=str(tmp_path / "meant"))
    runs = [
        {"keys": keys, "base": str(tmp_path / "stored"), "efficient_loading": efficient}
        for efficient in (False, True)
    ]
    sharded = on_ranks_of_their_own(2, 250, optimizer_worker.on_a_rank, "fsdp2", runs)[0]
    for after in sharded:
        change = torch.cat([(alone[n] - before[n]).flatten().double() for n in before])
        far = torch.cat([(after[n] - alone[n]).flatten().double() for n in before])
        assert float(change.abs().max()) > 1e-2
        assert far.norm() <= 1e-4 * change.norm(), float(far.norm() / change.norm())


def test_which_checkpoints_are_read_so() -> None:
    """On a GPU too, where transformers would keep FP8 and MXFP4 as they are."""
    assert widened(SimpleNamespace(quantization_config=STORED)).dequantize
    gpt_oss = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    found = widened(SimpleNamespace(quantization_config=gpt_oss))
    assert found.dequantize and found.modules_to_not_convert == ["lm_head"]
    for other in (None, {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}):
        assert widened(SimpleNamespace(quantization_config=other)) is None
    assert widened(SimpleNamespace()) is None
