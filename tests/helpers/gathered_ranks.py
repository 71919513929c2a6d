"""What the ranks of tests/memory/test_gathered.py run."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory.memory import gathered, split_masters, uncopied
from longfactory.memory.optimizer import SplitAdamW, local
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


def as_accelerate_shards(model: Any, reduced: torch.dtype, device: str = "cpu") -> None:
    """Layers, embedding, and last norm with output layer are units of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    keys: dict[str, Any] = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
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


def gathers_and_updates(tied: bool) -> list[list[str]]:
    """What happens in two steps, in order: units gathered, calls of the kernel with the names of
    what they update, events recorded and given to FSDP2, waits of its gathers.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as of_torch

    model: Any = model_of("llama", torch.bfloat16, tied)
    as_accelerate_shards(model, torch.bfloat16)
    names = {local(p).data_ptr(): n for n, p in model.named_parameters()}
    groups = [[p for n, p in model.named_parameters() if ("norm" in n) == norm] for norm in (0, 1)]
    optimizer = SplitAdamW([{"params": group} for group in groups], placement="gpu")
    gathered.begin(model, MemorySettings(keep_weights=True), optimizer)
    happened: list[str] = []
    gather = of_torch.foreach_all_gather

    def counted(params: list[Any], *args: Any) -> Any:
        happened.append(f"gather {params[0]._param_fqn}")
        return gather(params, *args)

    def kernel(parameters: Any, group: Any, step: float, scale: float) -> None:
        happened.extend(f"update {names[tensors[0].data_ptr()]}" for tensors in parameters)

    class Event:
        def record(self, stream: Any = None) -> None:
            happened.append("event")

    with (
        mock.patch.object(of_torch, "foreach_all_gather", counted),
        mock.patch.object(split_masters, "update_in_one_pass", kernel),
        mock.patch.object(SplitAdamW, "_is_one_pass", lambda self, p: True),
        mock.patch.object(gathered.torch, "Event", Event),
        mock.patch.object(
            torch.cpu.Stream, "wait_event", lambda self, e: happened.append(type(e).__name__)
        ),
        mock.patch.object(
            FSDPModule, "set_post_optim_event", lambda self, event: happened.append("given")
        ),
    ):
        steps = []
        for step in range(3):
            if step == 2:  # without the embedding
                model(inputs_embeds=torch.ones(1, 8, model.config.hidden_size).bfloat16())
                steps.append(list(happened))
                break
            loss_of(model, dist.get_rank(), step).backward()
            optimizer.step()
            model.zero_grad()
            steps.append(list(happened))
            happened.clear()
    return steps


def steps_of_both() -> list[list[str]]:
    """`gathers_and_updates` of a model whose embedding is a unit of its own, and of one whose
    embedding is the root's.
    """
    return gathers_and_updates(False) + gathers_and_updates(True)


def weights_after_steps(beside: bool, copied: bool, steps: int = 4) -> list[str]:
    """Of a model on GPUs whose update takes longer than a gather: digests of this rank's parts of
    its weights, with the first gathers beside the update or after it, and with large weights and
    gradients copied before they are sent, or as messages of their own.
    """
    uncopied.LEAST_BYTES = 1 << 60 if copied else 16 << 20
    torch.cuda.set_device(dist.get_rank())
    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 8192}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    model: Any = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=6, **sizes, **heads)
    model.set_attn_implementation("eager")
    as_accelerate_shards(model.cuda().train(), torch.bfloat16, "cuda")
    optimizer = SplitAdamW(model.parameters(), lr=1e-2, placement="gpu")
    gathered.begin(model, MemorySettings(keep_weights=True), optimizer if beside else None)
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(0, 8192, (1, 64), generator=generator).cuda()
        logits = model(input_ids=ids).logits.float()
        nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
        model.zero_grad()
    assert bool(optimizer._first) is beside
    gathered.give_up_weights(model)
    parts = [local(p).detach().view(torch.int16).cpu() for p in model.parameters()]
    return [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts]
