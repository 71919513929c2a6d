"""The memory plan of a run: chosen from its data and machine before anything is loaded, corrected after the first step."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch
from transformers import TrainerCallback

from longfactory.config import RunConfig
from longfactory.data.module import Datasets
from longfactory.model.memory.auto import MemoryPlan, choose_memory, corrected, host_memory, user_keys
from longfactory.model.memory.waiting import Activations

log = logging.getLogger("longfactory")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is kept where. `split`: trained weights are bf16 with a 16-bit remainder (exact fp32 masters; see SplitAdamW)."""

    plan: MemoryPlan
    split: bool


def plan_memory(cfg: RunConfig, model_config: Any, datasets: Datasets, ctx_size: int, sharding: str, world: int, cuda: bool) -> Memory:
    """`memory: auto | fast | long` on this machine, for the longest row of the data."""
    batch = int(cfg.trainer("per_device_train_batch_size"))
    train = datasets.train
    longest = int(max(train.lengths)) if train is not None and hasattr(train, "lengths") else cfg.data.cutoff_len
    lora = cfg.method.finetuning_type == "lora"
    gpu = torch.cuda.get_device_properties(0) if cuda else None

    def choose(split: bool) -> MemoryPlan:
        return choose_memory(
            model_config,
            longest * batch,
            gpu_bytes=gpu.total_memory if gpu else 0,
            host_bytes=host_memory(),
            gpu_name=gpu.name if gpu else "",
            world=world,
            sp=ctx_size,
            gpus_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            mode=cfg.memory.memory,
            sharded=sharding in ("fsdp2", "deepspeed"),
            lora=lora,
            split_master=split,
            user=user_keys(cfg.memory),
        )

    plan = choose(False)
    # Gradients of split weights are bf16: one micro-batch a step keeps them exact, a sum of several in bf16 would not.
    may_split = bool(cfg.hf.get("bf16")) and not lora and sharding != "deepspeed" and cuda and not cfg.method.pure_bf16
    if may_split and (cfg.memory.optimizer_placement == "host" or (not plan.fits and cfg.trainer("gradient_accumulation_steps") == 1)):
        other = choose(True)
        if other.fits or cfg.memory.optimizer_placement == "host":
            return Memory(other, True)
    return Memory(plan, False)


class FitMemory(TrainerCallback):
    """After the first step: settings corrected from its real peak. All ranks agree on it, since pieces of attention communicate."""

    def __init__(self, plan: MemoryPlan, activations: Activations):
        self.plan, self.activations, self.done = plan, activations, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done or args.device.type != "cuda":
            return
        self.done = True
        peak = torch.tensor(torch.cuda.max_memory_allocated(), dtype=torch.int64, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        settings, line = corrected(self.plan, int(peak))
        if line is not None:
            self.activations.change(settings)
            log.info(line)
