"""What a person sees of a run while it goes: one progress line, and a line for each row of the log.

On a terminal the progress line stays at the bottom and is redrawn; in a file or a pipe there is
none, and where rows of the log are rare a line tells once a minute that the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from longfactory import terminal
from longfactory.train.meter import Meter, Rates

log = logging.getLogger("longfactory")
SILENCE = 60.0
"""Seconds without a line, where no bar is seen, after which one is written."""
FIRST = ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch")
SHORT = {"learning_rate": "lr"}
RATES = tuple(Rates.__dataclass_fields__)
LEFT_OUT = (*FIRST, *RATES, "total_flos", "step", "num_input_tokens_seen")


class Measured(TrainerCallback):
    """Ends a step on the meter, and gives its rates to those who get a row of the log after it:
    trackers, `trainer_log.jsonl`, the terminal. The first of the callbacks. `trainer_state.json`
    does not hold them: a run that goes on from a checkpoint has the same.
    """

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.end()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.interrupted()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.interrupted()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.interrupted()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            logs.update(self.meter.rates(self.meter.since_log).known())
            self.meter.logged()


class ProgressLine(TrainerCallback):
    """The progress line and the lines of the log, by the first process.

    Args:
        meter: of the run.
        bar: whether a bar may be drawn (`disable_tqdm`).
        gpus: whether rates are those of a GPU, or of a process.
    """

    def __init__(self, meter: Meter, *, bar: bool = True, gpus: bool = True):
        self.meter, self.gpus = meter, gpus
        self.drawn = bar and terminal.interactive()
        self.bar: Any = None
        self.evaluation: Any = None
        self.loss: float | None = None
        self._told_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._told_at = time.monotonic()
        if state.is_world_process_zero and self.drawn:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                unit="step",
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt}{postfix}",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            self._put_words(state)
            self.bar.update(state.global_step - self.bar.n)
        elif time.monotonic() - self._told_at > SILENCE and not control.should_log:
            self._tell(f"step {state.global_step}/{state.max_steps}: {', '.join(self._now(state))}")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or "train_loss" in logs or not logs:
            return
        self.loss = logs.get("loss", self.loss)
        words = numbers(logs)
        if "loss" in logs:
            rates = Rates(**{name: logs.get(name) for name in RATES})
            words += told(rates, self.gpus)
            words += left(self.meter.remaining(state.global_step, state.max_steps))
        if self.bar is not None:
            self._put_words(state)
        kind = "evaluation after step" if "loss" not in logs else "step"
        self._tell(f"{kind} {state.global_step}/{state.max_steps}: {', '.join(words)}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.drawn:
            return
        if self.evaluation is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.evaluation = tqdm(total=total, desc="Evaluating", leave=False, dynamic_ncols=True)
        self.evaluation.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_evaluation()

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_evaluation()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _end_evaluation(self) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def _put_words(self, state: Any) -> None:
        words = [] if self.loss is None else [f"loss {self.loss:.4g}"]
        words += left(self.meter.remaining(state.global_step, state.max_steps))
        words += told(self.meter.of_recent(), self.gpus)
        self.bar.set_postfix_str(", ".join(words), refresh=False)

    def _now(self, state: Any) -> list[str]:
        """The last steps' rates, and the time that is left."""
        words = told(self.meter.of_recent(), self.gpus)
        return words + left(self.meter.remaining(state.global_step, state.max_steps))

    def _tell(self, line: str) -> None:
        self._told_at = time.monotonic()
        log.info(line)


def numbers(logs: Mapping[str, Any]) -> list[str]:
    """A row of the log in words, but for its rates."""
    names = [n for n in FIRST if n in logs] + [n for n in logs if n not in LEFT_OUT]
    return [
        f"{SHORT.get(name, name)} {logs[name]:.4g}"
        if isinstance(logs[name], float)
        else f"{name} {logs[name]}"
        for name in names
    ]


def told(rates: Rates, gpus: bool) -> list[str]:
    """Rates in words; what is not known is left out, and of waiting and padding what rounds to
    nothing.
    """
    words = []
    if rates.tokens_per_second_per_gpu is not None:
        unit = "GPU" if gpus else "process"
        words.append(f"{_rate(rates.tokens_per_second_per_gpu)} tokens/s/{unit}")
    if rates.mfu is not None:
        words.append(f"MFU {100 * rates.mfu:.0f} %")
    if rates.peak_memory_gib is not None:
        words.append(f"peak {rates.peak_memory_gib:.1f} GiB{'' if gpus else ' (host)'}")
    for name, share in (("data wait", rates.data_wait), ("padding", rates.padding)):
        if share is not None and share >= 0.0005:
            words.append(f"{name} {100 * share:.1f} %")
    if rates.packing is not None:
        words.append(f"rows {100 * rates.packing:.1f} % full")
    return words


def left(seconds: float | None) -> list[str]:
    """The time that is left, in words."""
    return [] if seconds is None else [f"{timedelta(seconds=round(seconds))} left"]


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
