"""`longfactory export`: adapters merged, and a plain Hugging Face folder written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longfactory.errors import UserError
from longfactory.model.generate import stop_tokens
from longfactory.output.load import load

if TYPE_CHECKING:
    from longfactory.config import RunConfig

VALUE_HEAD = "value_head.safetensors"


def export(cfg: RunConfig) -> Path:
    """Writes the merged model, its tokenizer and its template to `export_dir`, and pushes them where asked.

    The folder appears whole or not at all.

    Raises:
        UserError: the folder is in use, or the model or an adapter cannot be loaded.
    """
    assert cfg.output.export_dir is not None and cfg.model.model_name_or_path is not None
    target = Path(cfg.output.export_dir)
    sources = [Path(p) for p in (cfg.model.model_name_or_path, *cfg.model.adapter_name_or_path)]
    if any(s.exists() and target.exists() and s.samefile(target) for s in sources):
        raise UserError(f"export_dir: {target} is the folder that the model is read from. Choose another.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"export_dir: {target} exists and is not empty. Choose another folder, or remove it first.")
    device = torch.accelerator.current_accelerator() if cfg.output.export_device == "auto" and torch.accelerator.is_available() else None
    model, tokenizer = load(cfg, device or torch.device("cpu"))
    make_generation_config_valid(model)
    if model.generation_config is not None:
        # A template may have given the tokenizer another eos; without it here, generation would run past the end of an answer.
        model.generation_config.eos_token_id = stop_tokens(model, tokenizer, None) or None

    part = target.with_name(target.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        model.save_pretrained(part, max_shard_size=f"{cfg.output.export_size}GB")
        tokenizer.padding_side = "left"  # for generation
        tokenizer.save_pretrained(part)
        for source in reversed(sources):
            if (source / VALUE_HEAD).is_file():
                shutil.copy2(source / VALUE_HEAD, part / VALUE_HEAD)
                break
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if cfg.output.export_hub_model_id is not None:
        push(cfg, model, tokenizer)
    return target


def make_generation_config_valid(model: Any) -> None:
    """Some published models carry a temperature beside `do_sample: false`, which transformers refuses to save."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and not generation.do_sample:
        sampling = (generation.temperature, generation.top_p, generation.top_k)
        if any(value is not None and value != neutral for value, neutral in zip(sampling, (1.0, 1.0, 50), strict=True)):
            generation.do_sample = True


def push(cfg: RunConfig, model: Any, tokenizer: Any) -> None:
    """Uploads the model and the tokenizer.

    Raises:
        UserError: the hub refuses; the exported folder is complete all the same.
    """
    name, token = cfg.output.export_hub_model_id, cfg.model.hf_hub_token
    try:
        model.push_to_hub(name, token=token, max_shard_size=f"{cfg.output.export_size}GB")
        tokenizer.push_to_hub(name, token=token)
    except OSError as e:
        raise UserError(f"export_hub_model_id: {name} could not be pushed ({e}). The model is in {cfg.output.export_dir}.") from e
