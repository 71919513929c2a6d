"""Writes checkpoints as GPTQ and AWQ publish them, and beside each the ordinary weights that it
stands for. Needs no package: the formats are packed integers, scales and zero points.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longfactory.testing import tiny_model
from small_runs import write_tokenizer

GROUP = 32
STORED = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    },
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours lies in which four bits of a word."""


def words(rows: Tensor) -> Tensor:
    """[8 k, n] numbers of four bits -> [k, n] of 32, the first in the lowest bits."""
    out = torch.zeros(rows.shape[0] // 8, rows.shape[1], dtype=torch.int64)
    for i in range(8):
        out |= rows[i::8].long() << (4 * i)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def awq_words(columns: Tensor) -> Tensor:
    """[k, 8 n] numbers of four bits -> [k, n] of 32, in AWQ's order."""
    ordered = columns.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1)
    return words(ordered.T).T.contiguous()


def packed(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """A linear layer's weight [O, I] -> (its tensors in the checkpoint, what they stand for)."""
    out, width = weight.shape
    groups = weight.T.reshape(width // GROUP, GROUP, out)  # [O, I] -> [I/G, G, O]
    scales = (groups.abs().amax(1) / 7).half()
    steps = torch.round(groups / scales[:, None].float()).clamp(-8, 7) + 8
    meant = ((steps - 8).half() * scales[:, None]).float()  # rounded to 16 bits, as the packages do
    meant = meant.reshape(width, out).T.contiguous()
    steps, zeros = steps.reshape(width, out).long(), torch.full((width // GROUP, out), 8)
    if kind == "awq":
        held = {"qweight": awq_words(steps), "qzeros": awq_words(zeros), "scales": scales}
        return held, meant
    held = {
        "qweight": words(steps),
        "qzeros": words((zeros - 1).T).T.contiguous(),  # GPTQ stores them one lower
        "scales": scales,
        "g_idx": (torch.arange(width) // GROUP).int(),
    }
    return held, meant


def write(home: Path, kind: str) -> tuple[Path, Path]:
    """(a tiny Llama as `kind` publishes it, the same in full precision)."""
    folder, whole = home / kind, home / f"{kind} whole"
    for place in (folder, whole):
        size = write_tokenizer(place)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = tiny_model("llama", seed=0, vocab_size=size, tie_word_embeddings=False, **sizes)
    for place in (folder, whole):
        model.save_pretrained(place)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(whole / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.endswith("proj.weight"):
            held, meant[name] = packed(stored.pop(name), kind)
            stored |= {name.removesuffix("weight") + leaf: x for leaf, x in held.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = STORED[kind]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, whole
