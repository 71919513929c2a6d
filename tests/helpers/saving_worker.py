"""Trains two steps with sequence_parallel_size 2, saves, and goes on from the first step's
checkpoint with size 1.

Writes `folder/result.json`, and the trained weights as they are in memory to `folder/trained.pt`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import cpu_sharding
from invariance_worker import Samples, collate, samples, tiny
from longfactory import sp
from longfactory.memory import gathered
from longfactory.memory.settings import MemorySettings
from longfactory.model.source import read_source
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.shard import settings
from longfactory.sp import hf
from longfactory.sp.distance import worst
from longfactory.stages.tokens import TokenStage
from longfactory.train import output
from longfactory.train.callbacks import AtStart
from longfactory.train.trainer import RowTrainer


def write_base(folder: Path) -> None:
    """The checkpoint that the run is told to have loaded: the same weights, and two tensors that
    transformers does not load.
    """
    tiny("llama").save_pretrained(folder)
    state = load_file(folder / "model.safetensors") | {
        "mtp.proj.weight": torch.arange(6.0).view(2, 3),
        "mtp.norm.weight": torch.ones(3),
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def make(sharding: str, folder: Path, size: int, adapter: bool = False) -> RowTrainer:
    cpu_sharding.reset()
    extra: dict[str, Any] = {}
    if sharding.startswith("zero"):
        stage = int(sharding[-1])
        zero = {"stage": stage, "reduce_bucket_size": 10000} | (
            {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        )
        extra["deepspeed"] = settings.deepspeed_config(
            {"zero_optimization": zero, "zero_allow_untested_optimizer": True}, bf16=False
        )
    args = cpu_sharding.training_arguments(
        sharding,
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=size,  # two samples a step, with either size
        max_steps=2,
        learning_rate=0.05,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=1,
        **extra,
    )
    model = tiny("llama")
    model.set_attn_implementation(hf.ATTENTION)
    ctx = sp.SequenceParallel.create(size, mode="zigzag-ring")
    hf.prepare(model, ctx)
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    head = TokenLogprobs(model, chunk=13)
    data = Samples(samples("single", 6))
    source = read_source(model, str(folder.parent / "base"))
    trainer = RowTrainer(
        model,
        args,
        ctx=ctx,
        stage=TokenStage(),
        head=head,
        collate=collate,
        pad_id=0,
        source=source,
        train_dataset=data,
    )
    output.prove_saveable(trainer)
    if sharding == "fsdp2":
        settings.fix_fsdp2_plugin(trainer.accelerator, model)
        kept = MemorySettings(keep_weights=True)  # gathered weights must never be what is saved
        trainer.add_callback(AtStart(lambda: gathered.begin(trainer.model_wrapped, kept)))
    return trainer


def whole(trainer: RowTrainer) -> dict[str, Tensor]:
    """Every parameter as it is in memory, gathered one by one: not the way in which checkpoints are
    written.
    """
    out = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
        if hasattr(p, "full_tensor"):
            out[name] = p.detach().full_tensor().clone()
        elif not hasattr(p, "ds_id"):
            out[name] = p.detach().clone()
        else:
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                out[name] = p.detach().clone()
    return out


def save_and_go_on(sharding: str, path: str) -> None:
    """Body of a rank of a pool of its own. `sharding`: fsdp2 or zero3."""
    folder = Path(path)
    cpu_sharding.start(sharding)
    if dist.get_rank() == 0:
        write_base(folder / "base")
    dist.barrier()
    first = make(sharding, folder / "out", 2)
    kind = str(first.accelerator.distributed_type)
    first.train()
    first.save_model()
    trained = whole(first)
    if dist.get_rank() == 0:
        torch.save(trained, folder / "trained.pt")
    again = make(sharding, folder / "again", 1)
    checkpoint = str(folder / "out" / "checkpoint-1")
    again.check_resume(checkpoint)
    again.train(resume_from_checkpoint=checkpoint)
    resumed = whole(again)
    if dist.get_rank() == 0:
        result = {
            "kind": kind,
            "losses": [
                [h["loss"] for h in t.state.log_history if "loss" in h] for t in (first, again)
            ],
            "resumed": worst((resumed[n] - trained[n]).abs().max() for n in trained),
            "sharded": any(
                n != t.numel() for n, t in zip(held(first), trained.values(), strict=True)
            ),
        }
        (folder / "result.json").write_text(json.dumps(result))


def go_on_with_another_sharding(first: str, then: str, adapter: bool, path: str) -> None:
    """Body of a rank of a pool of its own: two steps with `first`, and the second one again from
    the first one's checkpoint with `then`.
    """
    folder = Path(path)
    cpu_sharding.start("fsdp2")
    if dist.get_rank() == 0:
        write_base(folder / "base")
    dist.barrier()
    once = make(first, folder / "out", 2, adapter)
    kinds = [str(once.accelerator.distributed_type)]
    once.train()
    trained = whole(once)
    checkpoint = str(folder / "out" / "checkpoint-1")
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]  # of the first trainer
    again = make(then, folder / "again", 2, adapter)
    kinds.append(str(again.accelerator.distributed_type))
    again.check_resume(checkpoint)
    again.train(resume_from_checkpoint=checkpoint)
    resumed = whole(again)
    if dist.get_rank() == 0:
        result = {
            "kinds": kinds,
            "losses": [
                [h["loss"] for h in t.state.log_history if "loss" in h] for t in (once, again)
            ],
            "differ": worst((resumed[n] - trained[n]).abs().max() for n in trained),
        }
        (folder / "result.json").write_text(json.dumps(result))


def held(trainer: RowTrainer) -> list[int]:
    """Numbers of each parameter that this rank holds by itself."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return [
        p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters()
    ]
