"""What a run tells while it goes: the LLaMA-Factory log file, the start-up proof, where the time
until the first step's end went, the data order's epoch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from longfactory import startup
from longfactory.config.folder import write_whole
from longfactory.train.meter import Rates

log = logging.getLogger("longfactory")
LOG_FILE = "trainer_log.jsonl"


class LogFile(TrainerCallback):
    """`trainer_log.jsonl`: one line a log event, with LLaMA-Factory's field names; boards read it
    while the run goes.

    Fields without a value are left out; times are H:MM:SS; `accuracy` is the share of pairs ranked
    right (or of tokens, for sft). A run that begins replaces an older file; one that goes on keeps
    the lines up to its checkpoint, so that no step stands there twice.

    Rates (`meter.Rates`), where they are known, have names of our own. The first line has
    `startup`: seconds of the parts of the time from the command to the end of the first step.

    Args:
        output_dir: its folder.
        remaining: gives the seconds from the end of a step to that of the last one; without it, or
            where it does not know, steps are taken to last alike.
        start: gives `startup`, once.
    """

    def __init__(
        self,
        output_dir: str,
        remaining: Callable[[int, int], float | None] = lambda step, last: None,
        start: Callable[[], dict[str, float]] = dict,
    ):
        self.path, self.remaining = Path(output_dir) / LOG_FILE, remaining
        self.start = start
        self.started = time.time()
        self.first_step = 0
        self.first_tokens = 0
        self.failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step, self.first_tokens = (
            time.time(),
            state.global_step,
            state.num_input_tokens_seen,
        )
        if state.is_world_process_zero:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._keep_lines(state, args.do_eval)
            except OSError as error:
                self._cannot(error)

    def _keep_lines(self, state: Any, evaluates: bool) -> None:
        if not self.path.exists():
            return
        if state.global_step == 0:
            self.path.unlink()
            return
        # Of the checkpoint's own step: what was logged before it was saved. An evaluation at the
        # end of the epoch may come after it, and comes again; that after the last step does, too.
        evaluated_again = evaluates and state.global_step >= state.max_steps
        logged = [h for h in state.log_history if "train_loss" not in h]
        at_step = sum(h.get("step") == state.global_step for h in logged)
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
                step = found["current_steps"]
            except (ValueError, KeyError, TypeError):
                continue  # cut by a kill
            if step < state.global_step:
                kept.append(line)
            elif step == state.global_step and at_step > 0:
                at_step -= 1
                if not (evaluated_again and any(key.startswith("eval_") for key in found)):
                    kept.append(line)
        write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or "train_loss" in logs:
            return
        elapsed = time.time() - self.started
        done = state.global_step - self.first_step
        remaining = self.remaining(state.global_step, state.max_steps)
        if remaining is None:
            remaining = elapsed / done * (state.max_steps - state.global_step) if done > 0 else 0.0
        tokens = logs.get("num_input_tokens_seen")
        line = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "loss": logs.get("loss"),
            "eval_loss": logs.get("eval_loss"),
            "reward": logs.get("reward"),
            "accuracy": logs.get("rewards/accuracies", logs.get("accuracy")),
            "eval_accuracy": logs.get("eval_rewards/accuracies", logs.get("eval_accuracy")),
            "grad_norm": logs.get("grad_norm"),
            "lr": logs.get("learning_rate"),
            "epoch": logs.get("epoch"),
            "percentage": (
                round(state.global_step / state.max_steps * 100, 2) if state.max_steps else 100
            ),
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "elapsed_seconds": round(elapsed, 3),
            "remaining_time": str(timedelta(seconds=int(remaining))),
        }
        line |= {name: logs[name] for name in Rates.__dataclass_fields__ if name in logs}
        line["startup"] = self.start() or None
        means = ("rewards/chosen", "rewards/rejected", "rewards/margins")
        line |= {name: logs[name] for name in means if name in logs}
        # With eval_on_each_dataset every set has a loss of its own.
        line |= {
            k: v
            for k, v in logs.items()
            if k.startswith("eval_") and k.endswith(("_loss", "_accuracy")) and k not in line
        }
        if tokens is not None and elapsed > 0:
            line["throughput"] = round((tokens - self.first_tokens) / elapsed, 2)
            line["total_tokens"] = tokens
        if (
            os.environ.get("RECORD_VRAM", "0").lower() in ("1", "true")
            and torch.cuda.is_available()
        ):
            line["vram_allocated"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            line["vram_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n")
        except OSError as error:
            self._cannot(error)

    def _cannot(self, error: OSError) -> None:
        if not self.failed:
            log.error(
                "%s cannot be written (%s). The run continues; lines will be missing there.",
                self.path,
                error.strerror or error,
            )
        self.failed = True


class Resume(TrainerCallback):
    """Gives a trainer that resumes what the checkpoint holds of its progress, and tells it where in
    an epoch it is.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.continue_progress()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = True


class AtStart(TrainerCallback):
    """Calls functions once, in order, when the model is wrapped and before the first step. Every
    rank calls them: they may communicate.
    """

    def __init__(self, *functions: Callable[[], Any]):
        self.functions = functions

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for function in self.functions:
            function()


class ToldStartup(TrainerCallback):
    """Says where the time from the command to the end of the first step went, of this process."""

    def __init__(self) -> None:
        self._row: dict[str, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        startup.done("evaluation")  # eval_on_start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = startup.end("first step")
        if found is not None and state.is_world_process_zero:
            self._row = found.row()
            log.info(found.line())

    def row(self) -> dict[str, float]:
        """Seconds of each part, the first time that it is asked for after the first step."""
        found, self._row = self._row, {}
        return found


class FreezeObjects(TrainerCallback):
    """After the first step of this process, Python's garbage collector leaves alone what is there.

    Now and then the collector looks at all objects of a process: those of the imports, the model
    and torch's compiler, more than a million. That takes 0.1 to 0.8 s, in which the process starts
    nothing on its GPU, and the others of the group wait for it. What is there after the first step
    mostly lives as long as the run.
    """

    def __init__(self) -> None:
        self.frozen = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.frozen:
            self.frozen = True
            gc.collect()  # what is garbage now would never be found again
            gc.freeze()


@contextlib.contextmanager
def objects_frozen(trainer: Any) -> Iterator[None]:
    """`FreezeObjects` while a trainer trains. For a process that is this run's alone: afterwards
    the collector looks at everything again, whoever had frozen it.
    """
    trainer.add_callback(FreezeObjects())
    try:
        yield
    finally:
        gc.unfreeze()


class Reported(TrainerCallback):
    """A tracker (wandb, tensorboard, ...) whose failure after the first step is one line in the
    log, and not the end of the run.

    Before the first step it raises: then a wrong key or a missing login can still be put right.
    """

    def __init__(self, tracker: TrainerCallback):
        self.tracker = tracker
        self._failed = False
        for name in dir(tracker):
            if name.startswith("on_") and name not in ("on_init_end", "on_train_begin"):
                setattr(self, name, self._guarded(name))

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        self.tracker.on_init_end(*args, **kwargs)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tracker.on_train_begin(*args, **kwargs)

    def _guarded(self, name: str) -> Callable[..., Any]:
        event = getattr(self.tracker, name)

        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            try:
                return event(args, state, control, **kwargs)
            except Exception as error:
                if not state.global_step:
                    raise
                if not self._failed:
                    log.error(
                        "report_to: %s failed (%s: %s). The run continues; the tracker's "
                        "record is incomplete.",
                        type(self.tracker).__name__,
                        type(error).__name__,
                        error,
                    )
                self._failed = True
                return None

        return call


def report_failures(handler: Any) -> None:
    """Wraps the trackers among a Trainer's callbacks (`trainer.callback_handler`) in `Reported`."""
    handler.callbacks = [
        Reported(c) if type(c).__module__.startswith("transformers.integrations") else c
        for c in handler.callbacks
    ]
