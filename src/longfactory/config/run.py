"""One run: its arguments by group, and the keys for transformers' trainer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from longfactory.config.arguments import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    LimitArguments,
    MemoryArguments,
    ModelArguments,
    OutputArguments,
    ParallelArguments,
)
from longfactory.config.data_arguments import packs
from longfactory.config.fields import is_secret
from longfactory.config.stage_facts import STAGES
from longfactory.config.trainer_keys import TrainerKeys
from longfactory.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, checked; nothing of it changes afterwards (`dataclasses.replace` makes another)."""

    model: ModelArguments
    data: DataArguments
    method: FinetuningArguments
    parallel: ParallelArguments
    limits: LimitArguments
    memory: MemoryArguments
    generating: GeneratingArguments
    output: OutputArguments
    hf: Mapping[str, Any] = dataclasses.field(repr=False)
    """Keys for transformers' Seq2SeqTrainingArguments that were given or that follow from others:
    read-only, in the order in which they were written.
    """
    trainer: TrainerKeys = dataclasses.field(init=False)
    """The same keys, typed, with defaults for those that are not in `hf`."""
    checkpoints: tuple[str, ...] = ()
    """Where the run may go on from, the first choice first; empty where it begins anew."""
    notes: tuple[str, ...] = ()
    """What the user should know: one sentence each, printed once."""
    decided: tuple[str, ...] = ()
    """Keys that were `auto` and have been decided (`train.auto`): their groups hold the numbers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hf", MappingProxyType(dict(self.hf)))
        object.__setattr__(self, "trainer", TrainerKeys(**self.hf))

    @property
    def output_dir(self) -> Path:
        assert self.trainer.output_dir is not None  # checked for every run that writes
        return Path(self.trainer.output_dir)

    @property
    def sequence_parallel_size(self) -> int:
        """Processes that share a row, once that is decided."""
        size = self.parallel.sequence_parallel_size
        assert size != "auto", "sequence_parallel_size is not decided yet"
        return size

    @property
    def cutoff_len(self) -> int:
        """Tokens of a document, at most, once that is decided."""
        assert self.data.cutoff_len != "auto", "cutoff_len is not decided yet"
        return self.data.cutoff_len

    @property
    def known_cutoff_len(self) -> int:
        """The same; 0 where it is not decided yet."""
        return 0 if self.data.cutoff_len == "auto" else self.data.cutoff_len

    @property
    def undecided(self) -> tuple[str, ...]:
        """Keys that are `auto` until the run starts."""
        both = (
            ("sequence_parallel_size", self.parallel.sequence_parallel_size),
            ("cutoff_len", self.data.cutoff_len),
        )
        return tuple(name for name, value in both if value == "auto")

    @property
    def precision(self) -> str:
        """torch's name of the numbers that matrices are multiplied in."""
        if self.method.pure_bf16 or self.trainer.bf16:
            return "bfloat16"
        return "float16" if self.trainer.fp16 else "float32"

    @property
    def packing(self) -> bool:
        """Whether rows are filled with several documents: as asked, else for pretraining alone."""
        return packs(self.data_options(), self.method.stage)

    @property
    def longest_sample(self) -> int:
        """Tokens of a sample, at most: of both answers of a pair, each with its prompt (a prompt
        that they share stands once, but long answers leave it one token).
        """
        return self.cutoff_len * STAGES[self.method.stage].documents

    @property
    def longest_row(self) -> int:
        """Tokens of a micro-batch of one data-parallel group, at most: they are one row."""
        return int(self.trainer.per_device_train_batch_size) * self.longest_sample

    def data_options(self) -> SimpleNamespace:
        """What the data layer asks for: the keys for data, and those of other groups that change
        rows or their reading.
        """
        share = self.method.pref_share_prompt
        if share == "auto":
            # NEFTune draws the noise of each answer's own sequence, prompt included.
            share = not self.trainer.neftune_noise_alpha
        return SimpleNamespace(
            **{f.name: getattr(self.data, f.name) for f in dataclasses.fields(self.data)},
            pref_share_prompt=share,
            rl_share_prompt=self.method.rl_share_prompt,
            hf_hub_token=self.model.hf_hub_token,
            disable_shuffling=self.method.disable_shuffling,
            equal_pairs=self.learns_from_equal_pairs,
            do_predict=bool(self.trainer.do_predict),
            do_eval=bool(self.trainer.do_eval),
        )

    @property
    def learns_from_equal_pairs(self) -> bool:
        """Whether a pair whose answers are the same teaches something: more than their difference
        is in the loss.
        """
        return STAGES[self.method.stage].learns_from_equal_pairs(self.method)

    @property
    def step_timeout(self) -> int:
        """Seconds that a micro-batch may take: as asked, else `ddp_timeout` up to half an hour."""
        asked = self.limits.step_timeout
        return min(self.trainer.ddp_timeout, 1800) if asked is None else asked

    @property
    def longest_timeout(self) -> int:
        """Seconds of the longest time limit of a phase. No collective may give up before: one rank
        may be saving while the others wait for it.
        """
        limits = self.limits
        return max(
            limits.startup_timeout,
            self.step_timeout,
            limits.save_timeout,
            limits.evaluation_timeout,
        )

    @property
    def log_tokens(self) -> bool:
        """Whether the number of tokens and their rate are logged."""
        seen = self.trainer.include_num_input_tokens_seen
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

        known = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
        # Rows are made by our own collator; a loss that is NaN is never logged as another.
        ours = {"remove_unused_columns": False, "label_names": [], "logging_nan_inf_filter": False}
        given = {**ours, **copy.deepcopy(dict(self.hf)), **extra}
        # transformers pickles its arguments beside the weights: see `reporting_environment`.
        given = {name: value for name, value in given.items() if not is_secret(name)}
        missing = sorted(set(given) - known)
        if missing:
            raise ConfigError(
                f"The installed transformers has no {', '.join(missing)}. Leave it out, or install"
                " another version."
            )
        try:
            return Seq2SeqTrainingArguments(**given)
        except (ValueError, TypeError, OverflowError, ImportError) as e:
            what = str(e) if len(str(e)) < 500 else f"{str(e)[:400]}..."
            raise ConfigError(f"transformers refuses the training arguments: {what}") from e

    def reporting_environment(self) -> dict[str, str]:
        """Environment variables by which transformers' reporting integrations, and the hub's own
        library, learn what their keys say. Nothing is set here.

        The token for uploads goes this way because transformers would write it, as one of its
        arguments, into every checkpoint.
        """
        out, o = {"TENSORBOARD_LOGGING_DIR": self.output.logging_dir}, self.output
        if o.use_swanlab or "swanlab" in (self.hf.get("report_to") or ()):
            out |= {
                "SWANLAB_PROJECT": o.swanlab_project,
                "SWANLAB_WORKSPACE": o.swanlab_workspace,
                "SWANLAB_MODE": o.swanlab_mode,
            }
            out |= {"SWANLAB_API_KEY": o.swanlab_api_key, "SWANLAB_LOG_DIR": o.swanlab_logdir}
        out["HF_TOKEN"] = self.trainer.hub_token
        return {name: value for name, value in out.items() if value is not None}
