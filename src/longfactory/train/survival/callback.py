"""What the Trainer does, told to the watch; and the stop at the boundary that all agreed on."""

from __future__ import annotations

import functools
from typing import Any

from transformers import TrainerCallback

from longfactory import progress
from longfactory.errors import Stopped
from longfactory.train.survival.signals import name_of
from longfactory.train.survival.watch import Watch
from longfactory.train.survival.words import stopped_before_training


class Survive(TrainerCallback):
    """Progress of the Trainer's loop, and a stop after a save. The last of the callbacks: those
    before it see the save that a stop asks for.

    A step's evaluation and log come before its save, as ever, so that the run that goes on has the
    same log rows. At the end of an epoch the stop waits for what is due there.

    Args:
        trainer: whose loop it is.
        watch: None where signals are not ours (tests, a loop of the user's own).
    """

    def __init__(self, trainer: Any, watch: Watch | None):
        self.trainer, self.watch = trainer, watch
        self.stopping, self.epoch_ended, self.saved_at = False, False, -1
        trainer._save_checkpoint = _in("save", "saving a checkpoint", trainer._save_checkpoint)
        trainer.evaluate = _in("evaluation", "evaluating", trainer.evaluate)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None and self.watch.at_boundary(state.global_step + 1):
            raise Stopped(stopped_before_training(self.watch.stop))
        progress.enter("start-up", "the first step", step=state.global_step + 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            # save_strategy: best has put the save off
            self.trainer._save_checkpoint(self.trainer.model_wrapped, None)
            self._stop(state)
        progress.moved()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress.moved()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress.enter("step", "training", step=state.global_step + 1)
        if self.watch is None:
            return
        if state.global_step >= state.max_steps:
            self.watch.finished()
        elif self.watch.at_boundary(state.global_step + 1):
            self.stopping = True
            control.should_save = control.should_save or not _ends_epoch(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ended = True
        if not self.stopping:
            return
        if self.saved_at == state.global_step:
            self._stop(state)
        control.should_save = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ended = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = state.global_step
        if self.stopping and (self.epoch_ended or not _ends_epoch(state)):
            self._stop(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress.moved()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.finished()

    def _stop(self, state: Any) -> None:
        assert self.watch is not None
        saved = f"{self.trainer.args.output_dir}/checkpoint-{state.global_step}"
        raise Stopped(
            f"Stopped by {name_of(self.watch.stop)} after step {state.global_step}: {saved} is "
            "saved. Run the same command again to resume."
        )


def _ends_epoch(state: Any) -> bool:
    """Whether the step that was done is the last of its epoch."""
    return state.epoch is not None and float(state.epoch).is_integer()


def _in(phase: progress.Phase, detail: str, call: Any) -> Any:
    """The function, within a phase."""

    @functools.wraps(call)
    def within(*args: Any, **kwargs: Any) -> Any:
        with progress.within(phase, detail):
            return call(*args, **kwargs)

    return within
