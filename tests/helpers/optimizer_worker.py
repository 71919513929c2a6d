"""Trains a tiny model for three steps with an optimizer of its own switch, on as many processes as
there are, and gives its parameters.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import cpu_sharding
import saving_worker
from invariance_worker import VOCAB, Samples, collate, deepspeed_json, samples

STEPS = 3


def model(family: str = "qwen3") -> Any:
    """With rows that two ranks cannot share evenly, and a head that is not hidden / heads wide."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


def loaded(folder: str) -> Any:
    """A checkpoint as a run loads it."""
    from longfactory.config.arguments import ModelArguments
    from longfactory.model import load
    from longfactory.sp import hf

    args = ModelArguments(model_name_or_path=folder)
    config = load.load_config(args, 64)
    return load.load_model(args, config, torch.float32, attention=hf.ATTENTION)


def made(cfg: Any, ctx: Any, trained: Any) -> Any:
    """What a run trains: the model, or it with its adapters, ready for the engine."""
    from longfactory.model import adapters
    from longfactory.sp import hf

    trained.set_attn_implementation(hf.ATTENTION)
    hf.prepare(trained, ctx)
    if cfg.method.finetuning_type == "full":
        return trained
    torch.manual_seed(5)
    return adapters.apply_finetuning(trained, cfg.method, cfg.model, is_trainable=True)


def run_config(keys: dict[str, Any]) -> Any:
    from longfactory.config import from_mapping

    base = {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere", "dry_run": True}
    return from_mapping({**base, "finetuning_type": "full", "learning_rate": 0.02, **keys})


def nudge(optimizer: torch.optim.Optimizer) -> None:
    """1e-7 of each gradient, up or down."""
    g = torch.Generator().manual_seed(17)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(1 + 1e-7 * torch.randn(p.shape, generator=g).sign())


def nudge_whole(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """1e-7 of each gradient's norm, spread over its entries, up or down: what sums in another order
    differ by, where an entry is a difference of larger ones.
    """
    g = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                size = 1e-7 * float(p.grad.norm()) / p.numel() ** 0.5
                p.grad.add_(torch.randn(p.shape, generator=g).sign(), alpha=size)


def memory() -> Any:
    from longfactory.train.memory_plan import Memory

    settings = types.SimpleNamespace(optimizer="gpu", gradients="gpu")
    plan = types.SimpleNamespace(
        settings=settings, fixed={}, job=types.SimpleNamespace(overlaps=False)
    )
    return Memory(plan, False)  # type: ignore[arg-type]


def train(
    keys: dict[str, Any],
    size: int,
    sharding: str,
    *,
    watch: Callable[[torch.optim.Optimizer], None] | None = None,
    folder: str | None = None,
    resume: bool = False,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    efficient_loading: bool = False,
) -> dict[str, torch.Tensor]:
    """Parameters after the run, whole, on the host.

    Args:
        keys: the run's, by which its optimizer is made.
        size: of the sequence-parallel group.
        sharding: none, ddp, fsdp2 or zero3 (in bf16).
        watch: called with the optimizer before each of its steps.
        folder: where a checkpoint is written after the second step.
        resume: go on from that checkpoint.
        base: the folder that the model is loaded from, as a run does it.
        efficient_loading: under FSDP2 the first process alone reads the files.
    """
    from longfactory import sp
    from longfactory.model.token_logprobs import TokenLogprobs
    from longfactory.shard import settings
    from longfactory.shard.export import full_state_dict
    from longfactory.stages.tokens import TokenStage
    from longfactory.train.optimizers import optimizer_factory
    from longfactory.train.trainer import RowTrainer

    cpu_sharding.reset()
    cfg = run_config(keys)
    fresh = model().to(dtype)  # before the arguments, by which ZeRO-3 would shard its drawing
    extra: dict[str, Any] = {}
    if sharding == "fsdp2" and efficient_loading:
        extra = settings.fsdp2_arguments(efficient_loading=True)
    if sharding == "zero3":
        zero = deepspeed_json("zero3")
        pure = cfg.method.pure_bf16
        extra["deepspeed"] = settings.deepspeed_config(zero, bf16=True, pure=pure)
        extra["bf16"] = True
    with tempfile.TemporaryDirectory() as scratch:
        args = cpu_sharding.training_arguments(
            sharding,
            folder or scratch,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=cfg.trainer.gradient_accumulation_steps,
            max_steps=steps,
            learning_rate=cfg.trainer.learning_rate,
            adam_epsilon=cfg.trainer.adam_epsilon,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            save_strategy="steps" if folder and not resume else "no",
            save_steps=2,
            **extra,
        )
        ctx = sp.SequenceParallel.create(size)
        trained = made(cfg, ctx, fresh if base is None else loaded(base))
        trainer = RowTrainer(
            trained,
            args,
            ctx=ctx,
            stage=TokenStage(),
            head=TokenLogprobs(trained, chunk=13),
            collate=collate,
            pad_id=0,
            make_optimizer=optimizer_factory(cfg, memory()),
            train_dataset=Samples(samples("single", 6 * STEPS)),
        )
        if sharding == "fsdp2":
            settings.fix_fsdp2_plugin(trainer.accelerator, trained)
        if watch is not None:
            make = trainer.create_optimizer

            def watched(*given: Any) -> Any:
                optimizer = make(*given)
                optimizer.register_step_pre_hook(lambda o, a, k: watch(o))
                return optimizer

            trainer.create_optimizer = watched  # type: ignore[method-assign]
        place = str(Path(folder or "") / "checkpoint-2") if resume else None
        trainer.train(resume_from_checkpoint=place)
        if sharding == "fsdp2":
            return {n: p.detach().cpu() for n, p in full_state_dict(trainer.model).items()}
        if sharding == "zero3":
            return saving_worker.whole(trainer)
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        return {n: p.detach().clone() for n, p in state.items()}


def on_a_rank(sharding: str, runs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Body of a rank: `train` under SP over all ranks for each of these arguments."""
    cpu_sharding.start(sharding)
    found = [train(size=dist.get_world_size(), sharding=sharding, **run) for run in runs]
    return found if dist.get_rank() == 0 else []


def with_types(sharding: str, keys: dict[str, Any]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Body of a rank: `train` under SP over all ranks, and the types of what the optimizer updates
    and of its states.
    """
    cpu_sharding.start(sharding)
    types: set[str] = set()

    def look(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            types.update(str(p.dtype) for p in group["params"])
        for state in optimizer.state.values():
            found = [x for x in state.values() if isinstance(x, torch.Tensor) and x.ndim]
            types.update(str(x.dtype) for x in found)

    size = dist.get_world_size()
    return train(keys, size, sharding, watch=look, dtype=torch.bfloat16), types
