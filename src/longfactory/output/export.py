"""`longfactory export`: adapters merged, and a plain Hugging Face folder written."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longfactory.errors import UserError
from longfactory.model import saved
from longfactory.model.generate import make_generation_config_valid, stop_tokens
from longfactory.model.source import in_words
from longfactory.model.value_head import FILE as VALUE_HEAD
from longfactory.output.load import load_with_source

if TYPE_CHECKING:
    from longfactory.config import RunConfig

log = logging.getLogger("longfactory")


def export(cfg: RunConfig) -> Path:
    """Writes the merged model, its tokenizer and its template to `export_dir`, and pushes them
    where asked.

    The folder appears whole or not at all.

    Raises:
        UserError: the folder is in use, or the model or an adapter cannot be loaded.
    """
    assert cfg.output.export_dir is not None and cfg.model.model_name_or_path is not None
    target = Path(cfg.output.export_dir)
    sources = [Path(p) for p in (cfg.model.model_name_or_path, *cfg.model.adapter_name_or_path)]
    if any(s.exists() and target.exists() and s.samefile(target) for s in sources):
        raise UserError(
            f"export_dir: {target} is the folder that the model is read from. Choose another."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"export_dir: {target} exists and is not empty. Choose another folder, or remove it"
            " first."
        )
    device = (
        torch.accelerator.current_accelerator()
        if cfg.output.export_device == "auto" and torch.accelerator.is_available()
        else None
    )
    model, tokenizer, source = load_with_source(cfg, device or torch.device("cpu"))
    if changes := make_generation_config_valid(model):
        log.warning("generation_config.json, in what is saved: %s.", "; ".join(changes))
    if model.generation_config is not None:
        # A template may have given the tokenizer another eos; without it here, generation would run
        # past the end of an answer.
        model.generation_config.eos_token_id = stop_tokens(model, tokenizer, None) or None

    part = target.with_name(target.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        model.save_pretrained(part, max_shard_size=f"{cfg.output.export_size}GB")
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # to generate
        tokenizer.save_pretrained(part)
        completed = saved.complete(
            part, source, model, max_bytes=int(cfg.output.export_size * 10**9)
        )
        if copied := [name for name in completed.copied if not saved.CONSTANTS.search(name)]:
            log.warning(
                "%d tensors of the checkpoint that transformers does not load are exported as they"
                " were, without an adapter's part: %s.",
                len(copied),
                in_words(copied),
            )
        saved.copy_side_files(source.folder, part, whole=True)
        other_numbers = bool(cfg.model.adapter_name_or_path or cfg.model.quantization_bit)
        if problems := saved.check_saved(part, model, source, merged=other_numbers):
            raise UserError(
                f"{target} was not written, the export is not complete: " + "; ".join(problems)
            )
        for folder in reversed(sources):
            if (folder / VALUE_HEAD).is_file():
                shutil.copy2(folder / VALUE_HEAD, part / VALUE_HEAD)
                break
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if cfg.output.export_hub_model_id is not None:
        push(cfg, target)
    return target


def push(cfg: RunConfig, folder: Path) -> None:
    """Uploads the exported folder as it is.

    Raises:
        UserError: the hub refuses; the exported folder is complete all the same.
    """
    from huggingface_hub import HfApi

    name = cfg.output.export_hub_model_id
    assert name is not None
    try:
        api = HfApi(token=cfg.model.hf_hub_token)
        name = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Model exported by LongFactory"
        )
    except Exception as error:  # httpx's and huggingface_hub's own, by the version
        raise UserError(
            f"export_hub_model_id: {name} could not be pushed ({error}). The model is in {folder}."
        ) from error
