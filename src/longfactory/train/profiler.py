"""`enable_torch_profiler`: a trace of some steps, of each process, for chrome://tracing and
Perfetto.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from longfactory.config import RunConfig

log = logging.getLogger("longfactory")


class Profiler(TrainerCallback):
    """Records optimizer steps by LLaMA-Factory's keys. A trace that cannot be written is reported
    and ends nothing.

    Args:
        folder: where `trace_rank<r>_step<n>.json` is written.
        wait, warmup, active, repeat: of `torch.profiler.schedule`, in optimizer steps.
        options: further arguments of `torch.profiler.profile`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        wait: int = 1,
        warmup: int = 1,
        active: int = 1,
        repeat: int = 1,
        **options: bool,
    ) -> None:
        self.folder = Path(folder)
        self.schedule = schedule(wait=wait, warmup=warmup, active=active, repeat=repeat)
        self.options = options
        self.profile: Any = None
        self.step = 0

    @classmethod
    def of_run(cls, cfg: RunConfig) -> Profiler:
        """As the run's keys say."""
        keys = cfg.output
        return cls(
            keys.profiler_output_dir or cfg.output_dir / "profiler",
            wait=keys.profiler_wait_steps,
            warmup=keys.profiler_warmup_steps,
            active=keys.profiler_active_steps,
            repeat=keys.profiler_repeat,
            record_shapes=keys.profiler_record_shapes,
            profile_memory=keys.profiler_profile_memory,
            with_stack=keys.profiler_with_stack,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.step = state.global_step
        self.profile = profile(
            activities=activities,
            schedule=self.schedule,
            on_trace_ready=self._write,
            **self.options,
        )
        self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        if self.profile is not None:
            self.profile.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.profile = None

    def _write(self, recorded: Any) -> None:
        rank = int(os.environ.get("RANK", "0"))
        path = self.folder / f"trace_rank{rank}_step{self.step}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.warning(f"The profiler's trace {path} could not be written: {error}")
        else:
            log.info(f"Profiler: {path}")
