"""A run's process groups, and transformers' TrainingArguments, which are made in them."""

from __future__ import annotations

import datetime
import logging
import os
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, set_seed

from longfactory import sp
from longfactory.config import RunConfig
from longfactory.errors import UserError
from longfactory.shard import settings as shard
from longfactory.sp import vision
from longfactory.train.loader import media_workers
from longfactory.train.memory_plan import Memory, zero_stage
from longfactory.train.prepare import Prepared

log = logging.getLogger("longfactory")


def init_distributed(
    cfg: RunConfig, prepared: Prepared, store: Any = None
) -> tuple[Seq2SeqTrainingArguments, sp.SequenceParallel]:
    """Opens the process group, and in it the sequence-parallel groups. The one place of a run that
    writes to the environment.

    Args:
        cfg: the run.
        prepared: what is known of it.
        store: where the processes meet; None: transformers opens the group by itself.

    Returns:
        transformers' TrainingArguments, and this process's place in the groups.
    Raises:
        UserError: the groups cannot be made.
    """
    if prepared.sharding == "none":
        shard.forget_launcher()
    os.environ.update(cfg.reporting_environment())
    if store is not None and prepared.sharding != "none":
        open_process_group(cfg, store)  # else transformers does so, when the arguments are made
    args = training_arguments(cfg, prepared.sharding, prepared.memory)
    device = args.device
    decode_beside(cfg, args, prepared)
    shard.train_as_one_device(args)
    set_seed(args.seed)  # adapters and value heads begin the same on every rank
    size = cfg.sequence_parallel_size
    try:
        ctx = sp.SequenceParallel.create(
            size,
            mode=cfg.parallel.sequence_parallel_mode,
            ulysses_degree=cfg.parallel.sequence_parallel_ulysses_degree,
            ring_degree=cfg.parallel.sequence_parallel_ring_degree,
            backend=cfg.parallel.attention_backend,
            device_type=device.type,
            flop_per_byte=prepared.memory.plan.job.machine.flop_per_byte,
            timeout=group_timeout(cfg),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if ctx.size != size:
        raise UserError(
            f"Sequence parallelism is off: sequence_parallel_size is {size}, and the group "
            f"that was made has {ctx.size} processes. Each would compute a whole row. A part "
            "of longfactory was replaced; reinstall it."
        )
    return args, ctx


def open_process_group(cfg: RunConfig, store: Any) -> None:
    """The process group as accelerate would open it, at the run's own store and with the run's own
    time limit, which accelerate drops on CPU.
    """
    cuda = torch.cuda.is_available() and not cfg.trainer.use_cpu
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        cfg.trainer.ddp_backend or ("nccl" if cuda else "gloo"),
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=group_timeout(cfg)),
    )


def group_timeout(cfg: RunConfig) -> float:
    """Seconds that a collective may take: `ddp_timeout`, and longer than any phase may, since the
    others wait in one while a rank saves. The watch ends a run that does not move before that.
    """
    return max(cfg.trainer.ddp_timeout, cfg.longest_timeout + 60.0)


def training_arguments(cfg: RunConfig, sharding: str, memory: Memory) -> Seq2SeqTrainingArguments:
    """transformers' TrainingArguments with the settings that keep gradients exact."""
    extra: dict[str, Any] = {
        "accelerator_config": shard.accelerator_arguments(),
        "ddp_find_unused_parameters": bool(cfg.trainer.ddp_find_unused_parameters),
        # the Trainer would count a row once for each rank that holds a part of it
        "include_num_input_tokens_seen": "no",
    }
    if memory.split:
        # the weights themselves are bf16: nothing is cast, and no fp32 copy is made of them
        extra["bf16"] = False
    if sharding == "fsdp2":
        extra |= shard.fsdp2_arguments(
            # Random weights are made on each device; loading them by rank 0 alone would only send
            # them round.
            efficient_loading=not (cfg.model.train_from_scratch or cfg.model.quantization_bit),
        )
    if sharding == "deepspeed":
        assert cfg.trainer.deepspeed is not None  # by choose_sharding
        pure = cfg.method.pure_bf16 and zero_stage(cfg)[0] == 3
        bf16 = cfg.trainer.bf16 or pure
        extra["deepspeed"] = shard.deepspeed_config(cfg.trainer.deepspeed, bf16=bf16, pure=pure)
        extra["bf16"] = bf16
    if not torch.cuda.is_available() and sharding != "deepspeed":
        # without it accelerate opens no process group on a machine without GPUs, and every process
        # trains alone
        extra["use_cpu"] = True
    return cfg.training_arguments(**extra)


def decode_beside(cfg: RunConfig, args: Seq2SeqTrainingArguments, prepared: Prepared) -> None:
    """Has images decoded by loader processes, beside the steps on a GPU, where the run's keys say
    nothing of them.
    """
    train, tower = prepared.datasets.train, prepared.memory.plan.job.tower
    if "dataloader_num_workers" in cfg.hf or tower is None or not hasattr(train, "image_patches"):
        return
    if args.device.type != "cuda":
        return  # the processor trains
    smallest = vision.empty_image(prepared.model_config)
    of_a_patch = 4 * smallest.pixels.numel() / smallest.patches
    pixels = prepared.memory.plan.job.local * tower.patches * of_a_patch
    size = f"{pixels / 2**30:.2g} GiB of pixels"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    args.dataloader_num_workers = media_workers(pixels, ranks)
    if args.dataloader_num_workers:
        if args.dataloader_prefetch_factor is None:
            args.dataloader_prefetch_factor = 1
        log.info(
            f"Images are decoded by {args.dataloader_num_workers} loader processes of each rank"
            f" (dataloader_num_workers): {size} in a rank's part of the longest row."
        )
    else:
        log.warning(
            "Images are decoded between steps, without loader processes: a rank's part of the "
            f"longest row has {size}, and there are too few CPU cores or too little shared "
            "memory (/dev/shm). Enlarge /dev/shm (docker run --shm-size), or set "
            "dataloader_num_workers."
        )
