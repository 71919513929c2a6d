"""`longfactory expand`: block expansion (LLaMA Pro, Wu et al., 2024), for `use_llama_pro`.

Behind every n-th layer a copy of it is put whose output projections are zero: the model computes
what it did. `use_llama_pro: true` with `freeze_trainable_layers` as many as were added trains the
copies alone (`finetuning_type: freeze`) or adapters on them (`lora`).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longfactory.errors import UserError
from longfactory.model.source import stored_tensors

log = logging.getLogger("longfactory")

_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*)$")
_ZERO = re.compile(r"\b(o_proj|down_proj)(\.(weight|bias))?$")
"""The last maps of attention and MLP, whose output is added to the stream of the layers."""


def expand(folder: str | Path, target: str | Path, added: int, shard_bytes: int = 5 * 10**9) -> int:
    """Writes the expanded model. Returns its number of layers.

    Args:
        folder: a model's safetensors, configuration and tokenizer.
        target: the new folder; it must not exist, or be empty.
        added: layers to add; divides the number of layers.
        shard_bytes: size of a file, at most (one tensor may be larger).
    Raises:
        UserError: the folder holds no safetensors with a configuration, the layers cannot be
            divided so, the target is in use, or the model's layers have no maps by the names o_proj
            and down_proj.
    """
    source, target = Path(folder), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"export_dir: {target} exists and is not empty. Choose another folder.")
    if not (source / "config.json").is_file():
        raise UserError(
            f"{source} has no config.json, expected a folder of safetensors. Write one first:"
            " longfactory export model_name_or_path=... export_dir=FOLDER."
        )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    if "num_hidden_layers" not in text:
        raise UserError(
            f"{source}: its configuration has no num_hidden_layers. This family cannot be expanded."
        )
    count = int(text["num_hidden_layers"])
    if added < 1 or count % added:
        raise UserError(
            f"num_expand: {added} does not divide the {count} layers of {source}. Choose one of"
            f" {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}."
        )
    stride = count // added
    stored = stored_tensors(source)
    if any(entry.file.suffix == ".bin" for entry in stored.values()):
        raise UserError(f"{source} holds .bin files. Write safetensors first (longfactory export).")
    prefix = _prefix(list(stored))
    zeroed = [n for n in stored if n.startswith(prefix) and _ZERO.search(n)]
    kinds = {"o_proj" in n for n in zeroed}
    if kinds != {True, False}:
        raise UserError(
            f"The layers of {source} have no o_proj and down_proj, whose copies are set to zero."
            " This family cannot be expanded."
        )
    target.mkdir(parents=True, exist_ok=True)
    weights = _write(_tensors(stored, prefix, stride), target, shard_bytes)
    text["num_hidden_layers"] = count + added
    for key, value in text.items():
        if isinstance(value, list) and len(value) == count:  # one entry for each layer
            text[key] = [x for i, x in enumerate(value) for x in [x] * (1 + _ends(i, stride))]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        other = file.suffix not in (".safetensors", ".bin") and "index" not in file.name
        if file.is_file() and other and file.name != "config.json":
            shutil.copy2(file, target / file.name)
    log.info(
        f"{target}: {count + added} layers, a copy after every {stride} ({weights} tensors). "
        "Train it with finetuning_type: freeze (or lora), use_llama_pro: true,"
        f" freeze_trainable_layers: {added}."
    )
    return count + added


def _ends(layer: int, stride: int) -> bool:
    return (layer + 1) % stride == 0


def _prefix(names: list[str]) -> str:
    """What stands before the numbers of the decoder layers: of most tensors, where a tower has
    layers too.
    """
    found = Counter(m.group(1) for n in names if (m := _LAYER.match(n)) and "vision" not in n)
    if not found:
        raise UserError("The model has no numbered layers.")
    return found.most_common(1)[0][0]


def _tensors(stored: dict[str, Any], prefix: str, stride: int) -> Any:
    """(name, function that reads the tensor, whether it is zero) of the expanded model."""
    for name, entry in stored.items():
        match = _LAYER.match(name)
        if match is None or match.group(1) != prefix:
            yield name, entry, False
            continue
        layer, rest = int(match.group(2)), match.group(3)
        place = layer + layer // stride
        yield f"{prefix}{place}{rest}", entry, False
        if _ends(layer, stride):
            yield f"{prefix}{place + 1}{rest}", entry, bool(_ZERO.search(rest))


def _read(entry: Any) -> Tensor:
    with safe_open(entry.file, framework="pt") as file:
        return file.get_tensor(entry.name)


def _write(tensors: Any, target: Path, shard_bytes: int) -> int:
    """Files of at most `shard_bytes` and their index; one tensor is in memory beside a file's."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        save_file(held, target / f"part-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    for name, entry, zero in tensors:
        tensor = _read(entry)
        tensor = torch.zeros_like(tensor) if zero else tensor.contiguous()
        length = tensor.numel() * tensor.element_size()
        if held and size + length > shard_bytes:
            flush()
        held[name] = tensor
        size += length
        total += length
    flush()
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        (target / f"part-{i}.safetensors").rename(target / file)
        index["weight_map"] |= dict.fromkeys(names, file)
    if len(shards) > 1:
        path = target / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return len(index["weight_map"])
