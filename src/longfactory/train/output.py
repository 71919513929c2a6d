"""The files of a run: the proof before its first step that they can be written; weights, tokenizer,
result files, curves, model card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longfactory.config import RunConfig, resolved
from longfactory.config.adapter_facts import trains_adapters
from longfactory.config.data_names import short_names
from longfactory.config.folder import write_whole
from longfactory.data.module import Datasets
from longfactory.errors import UserError
from longfactory.model import pissa, saved
from longfactory.model.generate import make_generation_config_valid
from longfactory.model.source import Source
from longfactory.train import saved_model
from longfactory.train.checkpoint.prune import SCRATCH
from longfactory.train.checkpoint.save import size_in_words, together
from longfactory.train.plots import plot_history
from longfactory.train.ranks import from_all

log = logging.getLogger("longfactory")

BY_US, BY_PEFT = "trained by LongFactory:", "# Model Card for Model ID"
"""By these words a card is known that may be written anew: ours, and the empty form that peft
leaves beside an adapter.
"""
CURVES = ("loss", "eval_loss", "eval_accuracy", "rewards/accuracies")


def curves(cfg: RunConfig) -> list[str]:
    """What is drawn of a run, where it was logged: LLaMA-Factory's pictures."""
    names = short_names(cfg.data.eval_dataset)
    each = (
        [f"eval_{name}_{what}" for name in names for what in ("loss", "accuracy")]
        if cfg.data.eval_on_each_dataset
        else []
    )
    return [*CURVES, *(["rewards/chosen"] if cfg.method.stage == "kto" else []), *each]


def save_trained(
    trainer: Any, cfg: RunConfig, tokenizer: Any, result: Any, *, results: bool = True
) -> None:
    """Weights as plain safetensors, tokenizer, `train_results.json`, `trainer_state.json`, curves,
    model card. Collective.

    The model comes first; whatever fails after it is reported and loses nothing else. Every file is
    written by every start that comes here, so that they are all there after a kill at any moment:
    results are those of all starts together.

    Args:
        results: write more than the model. False for a run that had come to its end before.
    Raises:
        UserError: on every rank, where the disk refuses the model.
    """
    if cfg.output.save_final_model:
        save_final_model(trainer)
    if not results:
        return
    trainer.log_metrics("train", result.metrics)
    for write in (
        lambda: save_metrics(trainer, "train", result.metrics),
        lambda: save_trainer_state(trainer),
    ):
        reported(write, "results of the training")
    if trainer.is_world_process_zero():
        if cfg.method.plot_loss:
            reported(
                lambda: plot_history(
                    trainer.state.log_history, trainer.args.output_dir, curves(cfg)
                ),
                "plot_loss: curves",
            )
        reported(
            lambda: write_model_card(cfg, trainer.args.output_dir), "README.md, the model card,"
        )


def save_final_model(trainer: Any) -> None:
    """The model into the output folder. Collective.

    Raises:
        UserError: on every rank, where the disk refuses.
    """
    folder = Path(trainer.args.output_dir)
    together("the model", trainer.save_model, folder, None, folder)


def convert_pissa(trainer: Any, start: dict[str, torch.Tensor]) -> None:
    """`pissa_convert`: beside the adapter that was saved, an ordinary one of twice the rank."""
    folder = trainer.args.output_dir
    if trainer.is_world_process_zero():
        reported(lambda: pissa.convert(folder, start), f"{pissa.FOLDER}, the converted adapter,")


def save_metrics(trainer: Any, split: str, metrics: dict[str, float]) -> None:
    """`<split>_results.json`, and the same in `all_results.json`: each whole or as it was. By the
    first process.
    """
    if trainer.is_world_process_zero():
        write_metrics(Path(trainer.args.output_dir), split, metrics)


def write_metrics(folder: Path, split: str, metrics: dict[str, float]) -> None:
    """The same, of a run without a trainer."""
    both = folder / "all_results.json"
    try:
        before = json.loads(both.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}  # none yet, or cut by a kill
    for path, content in (
        (folder / f"{split}_results.json", metrics),
        (both, {**before, **metrics}),
    ):
        write_whole(path, json.dumps(content, indent=4, sort_keys=True))


def save_trainer_state(trainer: Any) -> None:
    """`trainer_state.json` in the output folder, whole or as it was. By the first process."""
    if trainer.is_world_process_zero():
        text = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n"
        write_whole(Path(trainer.args.output_dir) / "trainer_state.json", text)


def reported(write: Callable[[], Any], what: str) -> None:
    """Calls a function whose failure is worth a line in the log, and not a run."""
    try:
        write()
    except Exception as error:
        log.error(
            "%s could not be written or sent (%s: %s). The run continues without it.",
            what,
            type(error).__name__,
            first_line(error),
        )


def push(trainer: Any) -> None:
    """Uploads the output folder where `push_to_hub` asks for it: the last thing that a run does.
    Collective.

    Raises:
        UserError: the hub refuses; all files are complete on this machine.
    """
    if not trainer.args.push_to_hub:
        return
    try:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    except Exception as error:
        raise UserError(
            f"push_to_hub: {trainer.args.output_dir} could not be uploaded ({type(error).__name__}:"
            f" {first_line(error)}). The trained model is complete in that folder. Upload it by"
            " `longfactory export` with export_hub_model_id, or by `hf upload`."
        ) from error


def first_line(error: BaseException) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


# ---- before the first step -----------------------------------------------------------------------


def prove_writable(args: Any, source: Source | None) -> None:
    """Refuses an output folder that cannot be written, or that the model is read from. Collective;
    before the Trainer makes the folder.

    Raises:
        UserError: on every rank.
    """
    _agree([_not_writable(args, source)] if args.should_save else [])


def prove_saveable(trainer: Any) -> None:
    """Saves all but the weights into a scratch folder, and removes it: what would fail at the first
    save fails now. Collective.

    Generation settings that transformers refuses to save are changed, with a line in the log.

    Raises:
        UserError: on every rank, where the run could not save its model.
    """
    args, problems = trainer.args, []
    changes = make_generation_config_valid(trainer.model)
    if changes:
        log.info("generation_config.json, in what is saved: %s.", "; ".join(changes))
    if args.should_save:
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=_existing(args.output_dir)))
        try:
            problems = [_failure(what, write) for what, write in _parts(trainer, scratch)]
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if any(problems):
            with contextlib.suppress(OSError):  # it is not empty: of a run of before
                os.rmdir(args.output_dir)
        _tell_of_space(trainer)
    _agree(problems)


def _agree(problems: list[str | None]) -> None:
    """Raises the problems of any rank as a UserError on every rank."""
    found = from_all([p for p in problems if p is not None])
    lines = list(dict.fromkeys(p for each in found for p in each))
    if lines:
        raise UserError(
            "This run would not be able to save its model, so training was not started:\n"
            + "\n".join(f"- {line}" for line in lines)
        )


def _existing(folder: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = Path(folder).expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _not_writable(args: Any, source: Source | None) -> str | None:
    parent = _existing(args.output_dir)
    is_there = parent == Path(args.output_dir).expanduser().absolute()
    if (
        is_there
        and source is not None
        and source.folder is not None
        and parent.samefile(source.folder)
    ):
        return (
            f"output_dir: {args.output_dir} is the folder that the model is read from. Choose"
            " another."
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    except OSError as error:
        return (
            f"output_dir: {args.output_dir} cannot be written: {error.strerror or error}. Choose"
            " another."
        )
    return None


def _tell_of_space(trainer: Any) -> None:
    args, needed = trainer.args, saved.bytes_to_save(trainer.model)
    free = shutil.disk_usage(_existing(args.output_dir)).free
    if not saved_model.writes_shards(trainer) and saved_model.replaces_first(trainer):
        log.warning(
            "output_dir: %s has %s of free space, and the model that is saved there needs %s: room"
            " for it only without the one that is there. overwrite_output_dir: true removes that"
            " one before this run's is written; if the save then fails, neither is left. Free up"
            " space to keep it until then.",
            args.output_dir,
            size_in_words(free),
            size_in_words(needed),
        )
    elif needed > free:
        log.warning(
            "output_dir: %s has %s of free space, and the model that is saved there needs %s "
            "(with save_strategy, each checkpoint needs that too, plus optimizer states). Free "
            "up space before the run ends.",
            args.output_dir,
            size_in_words(free),
            size_in_words(needed),
        )


def _parts(trainer: Any, scratch: Path) -> list[tuple[str, Callable[[], Any]]]:
    """What a save writes beside the tensors, and the names and dtypes of these."""
    model, source = trainer.model, trainer.source
    parts: list[tuple[str, Callable[[], Any]]] = []
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            parts.append(
                ("adapter_config.json", functools.partial(config.save_pretrained, scratch))
            )
        if trainer.args.load_best_model_at_end:
            parts.append(("The adapter", trainer.refuse_renamed_adapter))
    else:
        # The whole of transformers' saving, of no tensors: configuration, generation settings,
        # custom code, quantisation.
        parts.append(
            ("The model's configuration", lambda: model.save_pretrained(scratch, state_dict={}))
        )
    parts.append(("The names of the tensors", lambda: saved.check_saveable(model, source)))
    if trainer.processing_class is not None:
        parts.append(("The tokenizer", lambda: trainer.processing_class.save_pretrained(scratch)))
    parts.append(
        ("training_args.bin", lambda: torch.save(trainer.args, scratch / "training_args.bin"))
    )
    if source is not None:
        whole = not hasattr(model, "peft_config")
        parts.append(
            (
                f"Files of {source.folder}",
                lambda: saved.copy_side_files(source.folder, scratch, whole=whole),
            )
        )
    return parts


def _failure(what: str, write: Callable[[], Any]) -> str | None:
    try:
        write()
    except UserError as error:
        return str(error)
    except Exception as error:
        log.debug("dry save", exc_info=error)
        return (
            f"{what} cannot be saved ({type(error).__name__}): {' '.join(str(error).split())[:500]}"
        )
    return None


# ---- after the training --------------------------------------------------------------------------


def evaluate(trainer: Any, cfg: RunConfig, datasets: Datasets) -> dict[str, float]:
    """Evaluates, unless the last step was evaluated, and writes `eval_results.json`. Collective."""
    metrics = trainer.evaluated()
    trainer.log_metrics("eval", metrics)
    save_metrics(trainer, "eval", metrics)
    return metrics


def closing_lines(cfg: RunConfig) -> list[str]:
    """The last lines of a run that trained: where the model is, its picture, the next command."""
    folder = cfg.output_dir
    lines = []
    if cfg.output.save_final_model:
        what = "adapter" if trains_adapters(cfg.method) else "model"
        lines.append(f"The {what} is in {folder}.")
    pictures = [folder / f"training_{name.replace('/', '_')}.png" for name in curves(cfg)]
    if drawn := [str(path) for path in pictures if cfg.method.plot_loss and path.exists()]:
        lines.append(f"Plots: {', '.join(drawn)}.")
    if not cfg.output.save_final_model:
        return lines
    if cfg.model.train_from_scratch and trains_adapters(cfg.method):
        lines.append(
            "The random weights of its base model (train_from_scratch) are not saved: this "
            "adapter cannot be used with any model."
        )
        return lines
    shards = folder / "zero_to_fp32.py"
    if shards.is_file() and not trains_adapters(cfg.method) and not saved.weight_files(folder):
        # DeepSpeed's own files, as its configuration asks for
        words = ["python", str(shards), str(folder), str(folder), "--safe_serialization"]
        lines.append(f"Next: {shlex.join(words)}")
    else:
        lines.append(f"Next: {next_command(cfg)}")
    return lines


def next_command(cfg: RunConfig) -> str:
    """What is done with a trained model first: a chat with it; a reward model is evaluated, or made
    whole where it is an adapter; a pretrained one is fine-tuned.
    """
    folder, model = str(cfg.output_dir), str(cfg.model.model_name_or_path)
    adapter = trains_adapters(cfg.method)
    words = [f"model_name_or_path={folder}"]
    if adapter:
        words = [f"model_name_or_path={model}", f"adapter_name_or_path={folder}"]
    if cfg.model.trust_remote_code:
        words.append("trust_remote_code=true")
    if cfg.data.template is not None:
        words.append(f"template={cfg.data.template}")
    if adapter and cfg.method.stage in ("rm", "pt"):
        # The value head stands beside the weights; `export` copies it with them.
        return f"longfactory export {shlex.join([*words, f'export_dir={folder}_merged'])}"
    if cfg.method.stage == "rm":
        judged = ",".join(cfg.data.eval_dataset or cfg.data.dataset)
        words += ["do_train=false", "do_eval=true", f"eval_dataset={judged}", "val_size=0"]
        words.append(f"output_dir={folder}_eval")
        return f"longfactory train {shlex.join([f'{folder}/longfactory.yaml', *words])}"
    if cfg.method.stage == "pt":
        return f"longfactory init sft --model {shlex.quote(folder)}"
    return f"longfactory chat {shlex.join(words)}"


def write_model_card(cfg: RunConfig, folder: str) -> None:
    """README.md of the output folder: what was trained, on what, with which keys. A card that a
    person has written stays.
    """
    path = Path(folder) / "README.md"
    if path.exists() and not any(
        mark in path.read_text(encoding="utf-8", errors="replace") for mark in (BY_US, BY_PEFT)
    ):
        return
    tags = ["longfactory", cfg.method.finetuning_type, cfg.method.stage]
    text = "\n".join(
        [
            "---",
            f"library_name: {'peft' if cfg.method.finetuning_type == 'lora' else 'transformers'}",
            "license: other",
            f"base_model: {cfg.model.model_name_or_path}",
            "tags:",
            *[f"- {t}" for t in tags],
            "---",
            "",
            f"# {Path(folder).name}",
            "",
            (
                f"{cfg.model.model_name_or_path}, {BY_US} stage {cfg.method.stage},"
                f" {cfg.method.finetuning_type}, data {', '.join(cfg.data.dataset)}."
            ),
            "",
            "## Configuration",
            "",
            "```yaml",
            resolved(cfg).strip(),
            "```",
            "",
            f"torch {torch.__version__}",
            "",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `trainer_log.jsonl`."""
    from longfactory.train.callbacks import LOG_FILE

    with open(Path(folder) / LOG_FILE, encoding="utf-8") as f:
        return [json.loads(line) for line in f]
