"""The model that a run writes: whole or not at all, and with all that the checkpoint has that was
loaded.

Functions of the Trainer, by which it overrides transformers' saving. Those that are collective
gather first and write then: a process whose disk is full must not leave others waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from longfactory.errors import UserError
from longfactory.model import saved, value_head
from longfactory.model.source import Source, in_words, tied_duplicates
from longfactory.shard import export
from longfactory.train.checkpoint.prune import put_model_in_place, unfinished_model

log = logging.getLogger("longfactory")


def save_model(trainer: Any, output_dir: str | None = None) -> None:
    """Plain Hugging Face safetensors, whole, whatever the sharding. Collective: every rank
    calls it. Uploads nothing: `output.push`.

    Args:
        output_dir: a folder that holds no other model. None: the run's own, where an earlier
            model stays until this one is complete.
    """
    if output_dir is not None:
        _write_model(trainer, output_dir)
    elif writes_shards(trainer):
        # every process into the folder itself: DeepSpeed's files have names of their own
        _write_model(trainer, trainer.args.output_dir)
        if trainer.args.should_save:
            head = {value_head.FILE} if trainer.stage.output == "values" else set()
            saved.remove_earlier(Path(trainer.args.output_dir), adapter=False, kept=head)
    else:
        _replace_model(trainer, Path(trainer.args.output_dir))


def _replace_model(trainer: Any, folder: Path) -> None:
    """The model into the output folder, whole or not at all: written beside, and only then put
    in place of an earlier one. Where the disk has room for one alone, `overwrite_output_dir`
    lets the earlier one go first. Collective.
    """
    beside = folder / unfinished_model()
    if trainer.args.should_save:
        _make_room(trainer, folder)
    try:
        _write_model(trainer, str(beside))
    except BaseException:
        if trainer.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    if trainer.args.should_save:
        put_model_in_place(beside)


def _make_room(trainer: Any, folder: Path) -> None:
    """On the writing process, before what is collective: an error here would leave the others
    waiting. Where nothing could be removed the save says that the disk is full.
    """
    try:
        if replaces_first(trainer):
            log.warning(
                f"{folder} has no room for two models: the one there is removed before this"
                " run's is written."
            )
            saved.make_room(folder, adapter=hasattr(trainer.model, "peft_config"))
    except OSError as error:
        log.warning(
            f"The earlier model in {folder} could not be removed to make room:"
            f" {error.strerror or error}."
        )


def replaces_first(trainer: Any) -> bool:
    """Whether an earlier model of the output folder has to go before this run's is written, and
    may.
    """
    folder = Path(trainer.args.output_dir)
    return (
        bool(trainer.facts.configuration.get("overwrite_output_dir"))
        and folder.is_dir()
        and saved.fits_alone(
            folder,
            saved.bytes_to_save(trainer.model),
            adapter=hasattr(trainer.model, "peft_config"),
        )
    )


def writes_shards(trainer: Any) -> bool:
    """Whether each process of ZeRO-3 saves its part of a whole model, as DeepSpeed's file asks
    for. From the file: the engine is made after this is first asked.
    """
    if not trainer.is_deepspeed_enabled or hasattr(trainer.model, "peft_config"):
        return False
    file = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    return file.is_zero3() and not file.is_true(gathers)


def _write_model(trainer: Any, output_dir: str) -> None:
    """Writes into a folder, whatever it holds. Collective."""
    # what is collective comes first: a process whose disk is full must not leave others in it
    head = _value_head_tensors(trainer) if trainer.stage.output == "values" else None
    if trainer.is_fsdp_enabled:
        # Gathered one by one, tied weights no longer share their memory, by which transformers
        # would know them.
        duplicates = (
            tied_duplicates(trainer.model) if not hasattr(trainer.model, "peft_config") else set()
        )
        state = {
            name: t
            for name, t in export.full_state_dict(trainer.model).items()
            if name not in duplicates
        }
        # the other ranks have nothing: in transformers 5.17 they would write that
        if trainer.args.should_save:
            trainer._save(output_dir, state_dict=state)
    else:
        with _writes_here(trainer):
            Trainer.save_model(trainer, output_dir, _internal_call=True)  # without its upload
    if trainer.args.should_save:
        if head is not None:
            _save_value_head(head, output_dir)
        finish_save(trainer, output_dir)


@contextlib.contextmanager
def _writes_here(trainer: Any) -> Iterator[None]:
    """While open, `save_pretrained` writes on the first process of each machine where
    `save_on_each_node` asks for it; transformers writes on the run's first process alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.args.save_on_each_node or hasattr(model, "peft_config"):
        yield
        return
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def finish_save(trainer: Any, folder: str) -> None:
    """Gives a folder that `save_model` has written all that the loaded checkpoint has, and compares
    it. On the writing process.

    Raises:
        UserError: something of the model is not in the folder.
    """
    model, source = trainer.model, trainer.source
    whole = not hasattr(model, "peft_config")
    if whole and writes_shards(trainer):
        log.warning(
            "%s holds DeepSpeed's own files, and no safetensors: make them by its zero_to_fp32.py.",
            folder,
        )
        return
    if not whole:
        saved.rename_for_peft(folder, model)
    if source is not None:
        if whole:
            changes = saved.complete(folder, source, model)
            _tell(trainer, source, changes)
        saved.copy_side_files(source.folder, folder, whole=whole)
    if problems := saved.check_saved(folder, model, source):
        raise UserError(f"{folder} is not a complete save: " + "; ".join(problems))


def _tell(trainer: Any, source: Source, changes: saved.Changes) -> None:
    """Once a run: what was copied, and that it was not trained with the rest."""
    if trainer.copies_reported:
        return
    trainer.copies_reported = True
    stale = [name for name in changes.copied if not saved.CONSTANTS.search(name)]
    if stale:
        log.warning(
            "%d tensors of the checkpoint that transformers does not load are saved as they "
            "were: %s. They were not trained, so any multi-token-prediction heads among them "
            "are stale.",
            len(stale),
            in_words(stale),
        )
    if changes.elsewhere:
        log.warning(
            "%d tensors are saved under other names than in %s.",
            len(changes.elsewhere),
            source.folder,
        )


def _value_head_tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """The whole value head of a reward model, by the names of its file. Collective."""
    full = [_whole(p) for p in (trainer.head.value.weight, trainer.head.value.bias)]
    return {
        value_head.WEIGHT: full[0].cpu().contiguous(),
        value_head.BIAS: full[1].cpu().contiguous(),
    }


def _save_value_head(tensors: dict[str, torch.Tensor], folder: str) -> None:
    """`value_head.safetensors`, beside the weights of a reward model. On the writing process."""
    from safetensors.torch import save_file

    path = os.path.join(folder, value_head.FILE)
    save_file(tensors, path + ".part", metadata={"format": "pt"})
    os.replace(path + ".part", path)


def _whole(p: torch.Tensor) -> torch.Tensor:
    if hasattr(p, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
