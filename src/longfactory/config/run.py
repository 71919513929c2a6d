"""One run: its arguments by group, the keys for transformers' trainer, and the whole as YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from longfactory.config import checks, folder, translate
from longfactory.config.arguments import (
    GROUPS,
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    MemoryArguments,
    ModelArguments,
    OutputArguments,
    ParallelArguments,
)
from longfactory.config.fields import keys_of
from longfactory.config.read import read
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

Command = Literal["train", "export", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, checked. `hf` holds the keys for transformers' Seq2SeqTrainingArguments that were given or that we set."""

    model: ModelArguments
    data: DataArguments
    method: FinetuningArguments
    parallel: ParallelArguments
    memory: MemoryArguments
    generating: GeneratingArguments
    output: OutputArguments
    hf: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What the user should know: one sentence each, printed once."""

    def trainer(self, key: str) -> Any:
        """The value of one of transformers' keys, or its default."""
        return self.hf[key] if key in self.hf else TRAINER_KEYS[key].default

    @property
    def output_dir(self) -> Path:
        return Path(self.hf["output_dir"])

    @property
    def precision(self) -> str:
        """torch's name of the numbers that matrices are multiplied in."""
        if self.method.pure_bf16 or self.trainer("bf16"):
            return "bfloat16"
        return "float16" if self.trainer("fp16") else "float32"

    @property
    def packing(self) -> bool:
        """Whether rows are filled with several documents: as asked, else for pretraining alone."""
        if self.data.packing is None:
            return self.data.neat_packing or self.method.stage == "pt"
        return self.data.packing

    def data_options(self) -> SimpleNamespace:
        """What the data layer asks for: the keys for data, and those of other groups that change rows or their reading."""
        share = self.method.pref_share_prompt
        if share == "auto":
            # NEFTune draws the noise of each answer's own sequence, prompt included.
            share = not self.trainer("neftune_noise_alpha")
        return SimpleNamespace(
            **{f.name: getattr(self.data, f.name) for f in dataclasses.fields(self.data)},
            pref_share_prompt=share,
            hf_hub_token=self.model.hf_hub_token,
            disable_shuffling=self.method.disable_shuffling,
            equal_pairs=self.learns_from_equal_pairs,
            do_predict=bool(self.trainer("do_predict")),
            do_eval=bool(self.trainer("do_eval")),
        )

    @property
    def learns_from_equal_pairs(self) -> bool:
        """Whether a pair whose answers are the same teaches something: more than their difference is in the loss."""
        m = self.method
        return m.stage == "dpo" and (m.pref_loss not in checks.DIFFERENCES or m.pref_ftx > 0 or m.pref_bco_weight > 0)

    def resume_checkpoint(self) -> str | None:
        """The checkpoint to go on from: the one that was asked for, else the last one of the output folder."""
        return self.hf.get("resume_from_checkpoint")

    @property
    def log_tokens(self) -> bool:
        """Whether the number of tokens and their rate are logged."""
        seen = self.trainer("include_num_input_tokens_seen")
        return seen not in (False, "no") or self.method.include_effective_tokens_per_second

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return not self.memory.disable_gradient_checkpointing

    def training_arguments(self, **extra: Any) -> Seq2SeqTrainingArguments:
        """transformers' arguments of this run; `extra` wins over what the user wrote.

        Raises:
            ConfigError: transformers refuses a value.
        """
        from transformers import Seq2SeqTrainingArguments

        os.environ.update(self.reporting_environment())
        known = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
        given = {**self.hf, **extra}
        missing = sorted(set(given) - known)
        if missing:
            raise ConfigError(f"The installed transformers has no {', '.join(missing)}. Leave it out, or install another version.")
        try:
            return Seq2SeqTrainingArguments(**given)
        except (ValueError, ImportError) as e:
            raise ConfigError(f"transformers refuses the training arguments: {e}") from e

    def reporting_environment(self) -> dict[str, str]:
        """Environment variables by which transformers' reporting integrations learn what their keys say."""
        out, o = {"TENSORBOARD_LOGGING_DIR": self.output.logging_dir}, self.output
        if o.use_swanlab or "swanlab" in (self.hf.get("report_to") or ()):
            out |= {"SWANLAB_PROJECT": o.swanlab_project, "SWANLAB_WORKSPACE": o.swanlab_workspace, "SWANLAB_MODE": o.swanlab_mode}
            out |= {"SWANLAB_API_KEY": o.swanlab_api_key, "SWANLAB_LOG_DIR": o.swanlab_logdir}
        return {name: value for name, value in out.items() if value is not None}

    def resolved(self, world_size: int | None = None) -> str:
        """The run as YAML that can be run again: first the arithmetic as comments, then what was chosen, then every default."""
        from longfactory.config.show import show

        return show(self, world_size)

    def write(self) -> None:
        """Writes the resolved run beside the checkpoints. For one process to call."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / folder.RUN_FILE).write_text(self.resolved(), encoding="utf-8")


def load_config(argv: Sequence[str], *, command: Command = "train", world_size: int | None = None) -> RunConfig:
    """Reads, translates, types and checks a run. Imports neither torch nor transformers.

    Args:
        argv: `["x.yaml", "learning_rate=1e-5", ...]` or `["--stage", "sft", ...]`.
        command: what the run is for; training asks for data and an output folder.
        world_size: number of processes; default what the launcher's environment says, else unknown.
    Raises:
        ConfigError: with one sentence a problem.
    """
    return from_mapping(read(argv, translate.is_switch), command=command, world_size=world_size)


def from_mapping(written: Mapping[str, Any], *, command: Command = "train", world_size: int | None = None) -> RunConfig:
    """`load_config` from keys and values."""
    translate.other_file(written)
    # What is wrong is gathered before anything is raised, so that a person sees it at once.
    values, notes, problems = translate.known(written)
    try:
        values = translate.rename(values)
        notes += translate.drop_others(values)
        notes += translate.turn(values)
    except ConfigError as e:
        raise ConfigError("\n".join([*problems, str(e)])) from e

    groups: dict[str, Any] = {}
    given: set[str] = set()
    for group, cls in GROUPS.items():
        parsed = {}
        for name, key in keys_of(cls).items():
            if name in values:
                given.add(name)
                try:
                    parsed[name] = key.parse(values.pop(name))
                except ConfigError as e:
                    problems.append(str(e))
        groups[group] = cls(**parsed)
    hf: dict[str, Any] = {}
    for name in list(values):
        given.add(name)
        try:
            hf[name] = TRAINER_KEYS[name].parse(values.pop(name))
        except ConfigError as e:
            problems.append(str(e))
    assert not values
    if problems:
        raise ConfigError("\n".join(problems))

    cfg = RunConfig(**groups, hf=hf, notes=())
    if command == "train":
        _finish_training(cfg)
        if world_size is None and "LOCAL_RANK" in os.environ:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
        problems = list(checks.training(cfg, world_size))
        if not problems:
            missing = list(checks.extras(cfg))
            notes += missing if cfg.output.dry_run else []
            problems += [] if cfg.output.dry_run else missing
    else:
        problems = list(checks.inference(cfg, command))
    if problems:
        raise ConfigError("\n".join(problems))
    if command == "train":
        notes += checks.idle(cfg, given)
        notes += checks.negative_steps(cfg)
        notes += folder.settle(cfg)
    return dataclasses.replace(cfg, notes=tuple(notes))


def _finish_training(cfg: RunConfig) -> None:
    """Fills in what follows from other keys, and what LongFactory settles itself."""
    hf = cfg.hf
    if not any(hf.get(name) for name in ("do_train", "do_eval", "do_predict")):
        hf["do_train"] = True
    if cfg.trainer("eval_strategy") != "no":
        hf["do_eval"] = True
    # Rows are made by our own collator.
    hf["remove_unused_columns"] = False
    hf["label_names"] = ["labels"]
    for name in ("report_to", "optim_target_modules"):
        if hf.get(name) is not None:
            hf[name] = list(hf[name])
    if cfg.output.use_swanlab:
        others = [name for name in hf.get("report_to") or [] if name not in ("none", "swanlab")]
        hf["report_to"] = [*others, "swanlab"]
        if cfg.output.swanlab_run_name is not None:
            hf.setdefault("run_name", cfg.output.swanlab_run_name)
    if not hf.get("report_to", True):
        hf["report_to"] = "none"
    if cfg.method.finetuning_type == "lora":
        hf.setdefault("ddp_find_unused_parameters", False)
    if cfg.method.early_stopping_steps is not None:
        hf.setdefault("metric_for_best_model", "loss")
        if hf["metric_for_best_model"] in ("loss", "eval_loss"):
            hf.setdefault("greater_is_better", False)
