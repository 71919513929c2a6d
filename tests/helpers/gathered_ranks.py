"""What the ranks of tests/memory/test_gathered.py run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory.memory import gathered
from longfactory.memory.settings import MemorySettings
from longfactory.testing import tiny_model


def model_of(kind: str, dtype: torch.dtype, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model(kind, dtype=dtype, tie_word_embeddings=tied).train()
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model  # type: ignore[no-any-return]


def loss_of(model: Any, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=generator)
    logits = model(input_ids=ids).logits.double()
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def as_accelerate_shards(model: Any, reduced: torch.dtype) -> None:
    """Layers, embedding, and last norm with output layer are units of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    keys: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=reduced),
    }
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True, **keys)
    if not tied:
        fully_shard(model.model.embed_tokens, reshard_after_forward=True, **keys)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **keys)
    fully_shard(model, **keys)


def gradients_and_gathers(
    kind: str, keep: bool, dtype: torch.dtype, reduced: torch.dtype, tied: bool = False
) -> tuple[list[dict[str, Tensor]], list[list[str]]]:
    """Whole gradients of two micro-batches and a look at other data between them, and the units
    that each of the two gathered.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as of_torch

    model = model_of(kind, dtype, tied)
    as_accelerate_shards(model, reduced)
    gathered.begin(model, MemorySettings(keep_weights=keep))
    units: list[str] = []
    gather = of_torch.foreach_all_gather

    def counted(params: list[Any], *args: Any) -> Any:
        units.append(params[0]._param_fqn or "")
        return gather(params, *args)

    found, counts = [], []
    with mock.patch.object(of_torch, "foreach_all_gather", counted):
        for step in range(2):
            units.clear()
            loss_of(model, dist.get_rank(), step).backward()
            counts.append(list(units))
            found.append(
                {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
            )
            model.zero_grad()
            with torch.no_grad():
                loss_of(model, dist.get_rank(), 7)
            gathered.give_up_weights(model)
            assert all(hasattr(p, "full_tensor") for p in model.parameters())
    return found, counts
