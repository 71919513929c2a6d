"""transformers' Trainer with checkpoints of ours: saving, choosing what to go on from, and loading.

A checkpoint is written whole or not at all (`save.py`); transformers' methods write each part. What
a run has seen and not yet logged is part of it (`progress.py`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import EarlyStoppingCallback, ExportableState

from longfactory import sp
from longfactory.config import folder
from longfactory.errors import UserError
from longfactory.memory.optimizer import SplitAdamW
from longfactory.model.saved import bytes_to_save, check_saved, names_for_peft
from longfactory.model.value_head import FILE as VALUE_HEAD
from longfactory.model.value_head import load_value_head
from longfactory.shard import across, optimizer_states
from longfactory.stages.base import Stage
from longfactory.stages.metrics import MetricSums
from longfactory.train import saved_model
from longfactory.train.callbacks import Resume
from longfactory.train.checkpoint import changes, old, settings
from longfactory.train.checkpoint.facts import RunFacts
from longfactory.train.checkpoint.progress import (
    Progress,
    read_progress,
    read_state,
    write_state,
)
from longfactory.train.checkpoint.prune import prune
from longfactory.train.checkpoint.save import Part, optimizer_bytes, save_checkpoint
from longfactory.train.numbers import LoggedSteps, Numbers
from longfactory.train.output import first_line, reported
from longfactory.train.ranks import from_all
from longfactory.train.whole_weights import load_renamed

log = logging.getLogger("longfactory")
OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"  # transformers' names


class ResumableTrainer(Trainer):
    """A Trainer that goes on from its checkpoints at the exact sample.

    Args:
        model: prepared by `sp.hf.prepare`.
        args: transformers' TrainingArguments.
        ctx: the place in the sequence-parallel and data-parallel axes.
        stage: its state is part of a checkpoint.
        head: TokenLogprobs or TokenValues; the value head is part of a checkpoint.
        shuffle: whether training samples are shuffled.
        facts: what the run's checkpoints say of it.
        kwargs: of the Trainer.
    """

    numbers: Numbers

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        ctx: sp.SequenceParallel,
        stage: Stage,
        head: Any,
        shuffle: bool = True,
        facts: RunFacts | None = None,
        **kwargs: Any,
    ):
        self.ctx, self.stage, self.head, self.shuffle = ctx, stage, head, shuffle
        self.facts = RunFacts() if facts is None else facts
        self._train_metrics = MetricSums()
        # The step of the checkpoint to go on from, and whether that is the run's last.
        self.resumed_at, self.finished = -1, False
        # What the run had seen there; None where it begins, or the checkpoint does not say.
        self.resumed: Progress | None = None
        # Whether the last epoch's evaluation and rows of the log are done.
        self.epoch_ended = True
        self._last_step: tuple[Any, float | None] = (None, None)
        self._began, self._train_samples, self._updates, self._epochs = time.monotonic(), 0.0, 0, 0
        self._own_settings: list[dict[str, Any]] = []
        super().__init__(model, args, **kwargs)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._logged = LoggedSteps()
        # transformers counts whatever is named checkpoint-N, by the files' times
        self.save_total_limit = self.args.save_total_limit
        self.args.save_total_limit = None
        self.add_callback(Resume(self))

    @property
    def data_seed(self) -> int:
        """Of the samples' order."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _split_adamw(self) -> SplitAdamW | None:
        """The optimizer, where it is the one that transformers and FSDP2's checkpoints do not
        know.
        """
        if self.is_deepspeed_enabled:
            return None
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, SplitAdamW) else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        saved_model.save_model(self, output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes `checkpoint-<step>`, whole or not at all, and removes the oldest beyond
        `save_total_limit`. Collective.

        Raises:
            UserError: the disk refuses; earlier checkpoints are as they were.
        """
        self.store_flos()
        args, step, output_dir = self.args, self.state.global_step, Path(self.args.output_dir)
        progress = self._progress()
        self.state.best_model_checkpoint = self._best_checkpoint(output_dir)
        parts: list[Part] = [("weights", lambda f: self.save_model(str(f), _internal_call=True))]
        if not args.save_only_model:
            parts += [
                ("the optimizer's states", lambda f: self._save_optimizer_and_scheduler(str(f))),
                ("the scaler", lambda f: self._save_scaler(str(f))),
                ("states of random numbers", lambda f: self._save_rng_state(str(f))),
            ]
        parts.append(("the run's state", lambda f: self._save_state(f, progress)))
        manifest = {
            "run": self.facts.record.run,
            "step": step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "resumable": not args.save_only_model,
            "world": self._world(),
            "data": self.facts.data,
            "versions": changes.versions(),
            "configuration": self.facts.configuration,
        }
        final = save_checkpoint(args, step, parts, manifest, bytes_needed=self._bytes_to_save())
        self._prune()
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _world(self) -> dict[str, Any]:
        """Over what the run is spread, as a manifest says it."""
        return {
            "processes": self.args.world_size,
            "sequence_parallel_size": self.ctx.size,
            "sharding": self.facts.sharding,
        }

    def _prune(self) -> None:
        """Keeps `save_total_limit`, by the process that writes."""
        if not self.args.should_save:
            return
        removed = prune(
            Path(self.args.output_dir),
            self.save_total_limit,
            self.facts.record,
            self.state.best_model_checkpoint,
            self.state.global_step,
        )
        if removed:
            log.info(f"save_total_limit: {self.save_total_limit}: removed {', '.join(removed)}.")

    def _best_checkpoint(self, output_dir: Path) -> str | None:
        """The folder of the best step, where this run has saved it or is saving it now."""
        step = self.state.best_global_step
        best = output_dir / f"checkpoint-{step}"
        if not step or self.args.save_strategy == "no":
            return self.state.best_model_checkpoint
        ours = best.is_dir() and self.facts.record.holds(folder.run_of(best), step)
        if step == self.state.global_step or ours:
            return str(best)
        return self.state.best_model_checkpoint

    def _bytes_to_save(self) -> int:
        """About what this process writes into a checkpoint."""
        weights = bytes_to_save(self.model) if self.args.should_save else 0
        states = 0 if self.args.save_only_model else optimizer_bytes(self.optimizer)
        if self.is_fsdp_enabled:
            # every process writes its shards of the weights too
            return weights + states + bytes_to_save(self.model) // self.args.world_size
        return weights + (states if self.args.should_save else 0)

    def _save_state(self, directory: Path, progress: Progress) -> None:
        """The Trainer's state and ours, by the process that writes."""
        if not self.args.should_save:
            return
        exported: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {
            name: found[0] if len(found) == 1 else found for name, found in exported.items()
        }
        self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
        write_state(directory, {**self.run_state(), "stage": self.stage.state_dict()}, progress)

    def _progress(self) -> Progress:
        """Where the run stands. Collective."""
        mine = (self._tr_loss.item(), self._train_metrics.state_dict())
        everyone = from_all(mine)
        grad_norm, learning_rate = self._last_step
        stopping = self._early_stopping()
        return Progress(
            tokens=int(self._tokens),
            samples=self.state.global_step * self.get_total_train_batch_size(self.args),
            runtime=self._runtime(),
            unlogged=[loss for loss, _ in everyone],
            total_loss=self._total_loss_scalar,
            last_logged=self._globalstep_last_logged,
            metrics=[metrics for _, metrics in everyone],
            grad_norm=None if grad_norm is None else float(grad_norm),
            learning_rate=learning_rate,
            epoch_ended=self.epoch_ended,
            updates=[*self._logged.counts(), self.numbers.skipped],
            patience=None if stopping is None else stopping.early_stopping_patience_counter,
        )

    def _runtime(self) -> float:
        before = 0.0 if self.resumed is None else self.resumed.runtime
        return before + time.monotonic() - self._began

    def _early_stopping(self) -> EarlyStoppingCallback | None:
        found = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        return next(found, None)

    def _stopped_early(self) -> bool:
        """Whether the checkpoint is that of a run that early stopping has ended."""
        stopping, resumed = self._early_stopping(), self.resumed
        if stopping is None or resumed is None or resumed.patience is None:
            return False
        return resumed.patience >= stopping.early_stopping_patience

    def continue_progress(self) -> None:
        """At the start of training, once transformers has set its own counters: the run goes on
        with the sums and counts that the checkpoint holds, and with this run's intervals.
        """
        self._began = time.monotonic()
        self._tokens.fill_(self.state.num_input_tokens_seen)
        if self.resumed_at < 0:
            return
        self._prune()  # the run may have been killed before it did
        self.args.eval_on_start = False  # it is done
        self.state.num_train_epochs = self._epochs
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.resumed is None:
            return
        loss, metrics = self.resumed.for_rank(self.args.process_index, self.args.world_size)
        self._tr_loss = torch.tensor(loss, device=self.args.device)
        self._total_loss_scalar = self.resumed.total_loss
        self._globalstep_last_logged = self.resumed.last_logged
        self._train_metrics.load_state_dict(metrics, self.args.device)
        *counts, self.numbers.skipped = self.resumed.updates
        self._logged.set_counts(counts)
        self._last_step = (self.resumed.grad_norm, self.resumed.learning_rate)
        self._tokens.fill_(self.resumed.tokens)
        self.epoch_ended = self.resumed.epoch_ended
        if (stopping := self._early_stopping()) is not None:
            stopping.early_stopping_patience_counter = self.resumed.patience or 0

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        self._last_step = (grad_norm, learning_rate)
        super()._maybe_log_save_evaluate(
            tr_loss,
            grad_norm,
            model,
            trial,
            epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=learning_rate,
        )

    def _end_epoch(self) -> None:
        """What comes at the end of an epoch, where the checkpoint was saved before it."""
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)  # type: ignore[has-type]
        grad_norm, learning_rate = self._last_step
        self._maybe_log_save_evaluate(
            self._tr_loss,
            grad_norm,
            self.model_wrapped,
            None,
            self.state.epoch or 0.0,
            None,
            time.time(),
            learning_rate=learning_rate,
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if not self.epoch_ended and self.resumed_at % self._updates == 0:
            # an evaluation draws from the generators, which are now as they were before it
            self._end_epoch()

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        if self.finished and not self.epoch_ended:
            self._end_epoch()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _of_the_whole_run(self, runtime: float) -> dict[str, float]:
        """Results of all starts of a run together, where this one resumed."""
        steps = self.state.global_step
        if self.resumed is None or not steps:
            return {}
        runtime += self.resumed.runtime
        samples = self._train_samples * steps / max(self.state.max_steps, 1)
        return {
            "train_loss": self._total_loss_scalar / steps,
            "train_runtime": round(runtime, 4),
            "train_samples_per_second": round(samples / runtime, 3),
            "train_steps_per_second": round(steps / runtime, 3),
        }

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        reported(
            lambda: super(ResumableTrainer, self)._push_from_checkpoint(checkpoint_folder),
            f"push_to_hub: {checkpoint_folder}",
        )

    def _finish_current_push(self) -> None:
        reported(super()._finish_current_push, "push_to_hub: the last checkpoint")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self._split_adamw()
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_fsdp_enabled:
            from accelerate.utils import save_fsdp_model

            save_fsdp_model(
                self.accelerator.state.fsdp_plugin,
                self.accelerator,
                self.model,
                output_dir,
                adapter_only=True,
            )
        optimizer_states.save_states(
            optimizer, self.model.named_parameters(), output_dir, writes_whole=self.args.should_save
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """States from the checkpoint; learning rate, schedule, decay and betas from the run's keys.

        Raises:
            UserError: the states are of another optimizer or of other parameters.
        """
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self._split_adamw()
        if optimizer is None:
            if optimizer_states.holds_states(checkpoint):
                raise UserError(
                    f"The checkpoint {checkpoint} was made by AdamW on the host or with split"
                    " weights. Set optimizer_placement: host."
                )
            try:
                self._load_states(checkpoint)
            except (ValueError, KeyError, RuntimeError) as error:
                raise UserError(
                    f"The optimizer's states in {checkpoint} are of another optimizer or of other"
                    f" parameters than this run's ({first_line(error)}). Use the same optim and"
                    " finetuning_type."
                ) from error
        else:
            optimizer_states.load_states(optimizer, self.model.named_parameters(), checkpoint)
            self.lr_scheduler.load_state_dict(
                torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
            )  # type: ignore[union-attr]
        settings.apply_settings(self.optimizer, self.lr_scheduler, self._own_settings)

    def _load_states(self, checkpoint: str) -> None:
        """transformers' own, or states that another sharding has saved."""
        states = across.states_of(checkpoint)
        if self.is_fsdp_enabled and states == "whole":
            across.load_whole_states(self.optimizer, self.model, checkpoint)
        elif not self.is_fsdp_enabled and not self.is_deepspeed_enabled and states == "sharded":
            across.load_sharded_states(self.optimizer, self.model, checkpoint)
        elif self.args.world_size > 1 and self.args.device.type == "cpu" and states == "whole":
            # transformers loads to the process's own device, and torch 2.11 knows no cpu:1
            path = os.path.join(checkpoint, OPTIMIZER_NAME)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(loaded)  # type: ignore[union-attr]
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.lr_scheduler.load_state_dict(  # type: ignore[union-attr]
            torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.refuse_renamed_adapter()
        saved_sharded = os.path.isdir(os.path.join(resume_from_checkpoint, across.SHARDED_MODEL))
        if saved_sharded != self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            across.load_weights(
                self.model if model is None else model,
                resume_from_checkpoint,
                sharded=self.is_fsdp_enabled,
            )
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str | None) -> None:
        """What a load of one process leaves out of a whole model; of an adapter, whether it left
        out anything.

        Raises:
            UserError: the adapter differs from the file's.
        """
        if not folder or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        if not hasattr(self.model, "peft_config"):
            load_renamed(self.model, folder)
        elif problems := check_saved(folder, self.model):
            raise UserError(
                f"The adapter in {folder} was not loaded as it was saved: " + "; ".join(problems)
            )

    def refuse_renamed_adapter(self) -> None:
        """Sharded checkpoints hold an adapter under today's names.

        Raises:
            UserError: PEFT does not find all of these again.
        """
        if (
            self.is_fsdp_enabled
            and hasattr(self.model, "peft_config")
            and (names := names_for_peft(self.model))
        ):
            raise UserError(
                f"PEFT does not find {len(names)} tensors of this model's adapter in a sharded "
                f"checkpoint ({next(iter(names))}), so the run cannot resume from it. Start "
                "from the saved adapter instead (adapter_name_or_path: the checkpoint's "
                "folder)."
            )

    def run_state(self) -> dict[str, Any]:
        """What decides which samples a step takes. A checkpoint resumes only where this is the
        same.
        """
        return {
            "total_batch_size": self.get_total_train_batch_size(self.args),
            "samples": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,  # type: ignore[arg-type]
            "data_seed": self.data_seed,
            "shuffle": self.shuffle,
            "train_sampling_strategy": str(getattr(self.args, "train_sampling_strategy", "random")),
            "dataloader_drop_last": self.args.dataloader_drop_last,
            "data": self.facts.data,
            "sequence_parallel_size": self.ctx.size,
        }

    def check_resume(self, checkpoint: str, manifest: dict[str, Any] | None = None) -> None:
        """Refuses a checkpoint whose steps took other samples than this run's would, or whose
        states this run cannot load; tells what else is changed, and gives the stage and the value
        head their states back.

        Args:
            manifest: of the checkpoint, where it has one.
        Raises:
            UserError: with what differs and how to make it agree.
        """
        steps = os.path.join(checkpoint, TRAINER_STATE_NAME)
        if os.path.isfile(steps):
            with open(steps) as f:
                self.resumed_at = json.load(f)["global_step"]
        changed: dict[str, tuple[Any, Any]] = {}
        if manifest is not None:
            changed = changes.changed_keys(manifest["configuration"], self.facts.configuration)
            engines = (manifest["world"]["sharding"], self.facts.sharding)
            changes.refuse_other_states(
                checkpoint, changed, self.facts.configuration, sharding=engines
            )
        else:
            old.refuse_other_kind(Path(checkpoint), adapter=hasattr(self.model, "peft_config"))
        headless = self.stage.output == "values" and not load_value_head(self.head, checkpoint)
        # The weights of a whole model hold the head; those of an adapter do not.
        if headless and os.path.isfile(os.path.join(checkpoint, "adapter_config.json")):
            raise UserError(
                f"The checkpoint {checkpoint} has no {VALUE_HEAD}, so it is not a reward "
                "model. Start over."
            )
        then = read_state(checkpoint)
        if then is not None:
            self.stage.load_state_dict(then.get("stage", {}))
            self.resumed = read_progress(then)
            if not self.args.ignore_data_skip:
                samples = (
                    self._train_batch_size,
                    self.args.gradient_accumulation_steps,
                    self.ctx.dp_size,
                )
                changes.refuse_other_samples(
                    checkpoint, changed, then, self.run_state(), of_a_step=samples
                )
        changes.tell(checkpoint, changed, manifest, self._world())
