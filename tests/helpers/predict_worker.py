"""Generates answers with sharded parameters, after two steps of training or without any.

Writes what `predict` writes, and the whole weights to `folder/weights.pt`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import cpu_sharding
from longfactory.train.predict import predict
from predicted import DOCUMENTS, GREEDY, make_tokenizer
from saving_worker import held, make, whole


def predict_sharded(sharding: str, trains: bool, path: str) -> None:
    """Body of a rank of a pool of its own. `sharding`: fsdp2 or zero2."""
    folder = Path(path)
    cpu_sharding.start(sharding)
    trainer = make(sharding, folder, 1)
    if trains:
        trainer.train()
    else:
        trainer.shard_model()
        assert 4 < trainer.evaluate(trainer.train_dataset)["eval_loss"] < 5
    cfg = SimpleNamespace(generating=GREEDY, data=SimpleNamespace(template=None))
    predict(
        trainer, cfg, make_tokenizer(), SimpleNamespace(eval={"eval": [[d] for d in DOCUMENTS]})
    )
    weights = whole(trainer)
    assert (sharding == "fsdp2") == any(
        n != t.numel() for n, t in zip(held(trainer), weights.values(), strict=True)
    )
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
