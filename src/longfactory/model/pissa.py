"""A PiSSA adapter as an ordinary LoRA adapter of the untouched base weights (`pissa_convert`).

PiSSA trains A, B beside W - s B0 A0, s = alpha / rank. The model becomes W + s (B A - B0 A0), which
is LoRA of twice the rank: A' = [A; A0], B' = [B, -B0].
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longfactory.model.saved import ADAPTER_FILE, adapter_name

FOLDER = "pissa_converted"
CONFIG_FILE = "adapter_config.json"


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the host of the matrices that PiSSA begins with, by their names in an adapter's
    file. To be called before anything is trained or loaded.
    """
    return {
        adapter_name(name): p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if (".lora_A." in name or ".lora_B." in name) and p.device.type != "meta"
    }


def convert(folder: str | Path, start: dict[str, Tensor]) -> Path:
    """Writes the ordinary adapter of a folder's PiSSA adapter into a folder inside it.

    Args:
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        start: of `start_of`.
    Returns:
        The folder that was written.
    Raises:
        KeyError: the adapter has a matrix that is not in `start`.
    """
    source = Path(folder)
    target = source / FOLDER
    target.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    with safe_open(source / ADAPTER_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            trained = file.get_tensor(name)
            if ".lora_A" in name:  # [r, in] -> [2r, in]
                tensors[name] = torch.cat([trained, start[name].to(trained)])
            elif ".lora_B" in name:  # [out, r] -> [out, 2r]
                tensors[name] = torch.cat([trained, -start[name].to(trained)], dim=1)
            else:
                tensors[name] = trained
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    factor = math.sqrt(2) if config.get("use_rslora") else 2  # the scale s stays what it is
    config["r"] *= 2
    config["lora_alpha"] *= factor
    config["rank_pattern"] = {k: 2 * r for k, r in (config.get("rank_pattern") or {}).items()}
    pattern = config.get("alpha_pattern") or {}
    config["alpha_pattern"] = {k: factor * a for k, a in pattern.items()}
    config["init_lora_weights"] = True
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, target / ADAPTER_FILE, {"format": "pt"}
    )
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target
