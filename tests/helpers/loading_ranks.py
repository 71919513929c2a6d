"""A run's model from a checkpoint, up to where FSDP2 has sharded it: what each rank then has, and the
memory that loading took.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cpu_sharding
from invariance_worker import Samples, collate, samples
from longfactory import sp
from longfactory.config import load_config
from longfactory.model import load
from longfactory.shard import settings
from longfactory.stages.tokens import TokenStage
from longfactory.train.model import build_model
from longfactory.train.run import parallelize
from longfactory.train.trainer import RowTrainer


def config_of(folder: str, keys: dict[str, Any]) -> Any:
    words = {
        "model_name_or_path": folder,
        "stage": "pt",
        "do_train": True,
        "dataset": "texts",
        "output_dir": f"{folder}-out",
        "use_cpu": True,
        **keys,
    }
    return load_config([f"{name}={value}" for name, value in words.items()])


def on_a_rank(
    folder: str, keys: dict[str, Any], noise: bool = False
) -> tuple[dict[str, Tensor], int]:
    """Body of a rank of a pool of its own: parameters and buffers of the sharded model, whole, and
    the bytes of its own that this process got while it loaded them.

    Args:
        noise: memory that nothing was written to holds NaN, which else it does now and then.
    """
    if noise:
        load._without_values = _with_nan(load._without_values)
    cpu_sharding.start("fsdp2")
    given = arguments(folder, keys)
    *_, ctx, args, stage = given
    torch.manual_seed(5)
    before = own_memory()
    model, head, _ = build_model(*given, False)
    taken = own_memory() - before
    trainer = RowTrainer(
        model,
        args,
        ctx=ctx,
        stage=stage,
        head=head,
        collate=collate,
        pad_id=0,
        train_dataset=Samples(samples("single", 2)),
    )
    parallelize(trainer, "fsdp2", dist.get_world_size(), split=False)
    trainer.shard_model()
    sharded = trainer.model_wrapped
    found = {name: p.detach().full_tensor() for name, p in sharded.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in sharded.named_buffers()}
    kept = set(sharded.state_dict())
    assert {n for n, _ in sharded.named_parameters()} <= kept
    found |= {f"in state: {n}": torch.tensor(n in kept) for n, _ in sharded.named_buffers()}
    return found, taken


def arguments(folder: str, keys: dict[str, Any]) -> tuple[Any, ...]:
    """What `build_model` of a run under FSDP2 is called with."""
    cpu_sharding.reset()
    cfg = config_of(folder, keys)
    args = cpu_sharding.training_arguments(
        "fsdp2", f"{folder}-out", do_train=True, max_steps=1, **settings.fsdp2_arguments()
    )
    ctx = sp.SequenceParallel.create(dist.get_world_size())
    config, tokenizer = load.load_config(cfg.model, 64), load.load_tokenizer(cfg.model)
    return cfg, config, tokenizer, ctx, args, TokenStage()


def refusals(folders: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Body of a rank of a pool of its own: what ends the run for each folder and keys, on this
    rank.
    """
    cpu_sharding.start("fsdp2")
    found = []
    for folder, keys in folders:
        try:
            build_model(*arguments(folder, keys), False)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("nothing")
    return found


def _with_nan(without_values: Callable[[Any], None]) -> Callable[[Any], None]:
    def filled(model: Any) -> None:
        without_values(model)
        for given in (*model.parameters(), *model.buffers()):
            if given.is_floating_point():
                given.detach().fill_(float("nan"))

    return filled


def own_memory() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
