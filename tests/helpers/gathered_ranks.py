"""What the ranks of tests/memory/test_gathered.py run."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import stream_clocks
from longfactory.memory import gathered, split_masters, uncopied
from longfactory.memory.optimizer import SplitAdamW, local
from longfactory.memory.settings import MemorySettings
from longfactory.testing import tiny_model


def model_of(kind: str, dtype: torch.dtype, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model(kind, dtype=dtype, tie_word_embeddings=tied).train()
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model  # type: ignore[no-any-return]


def loss_of(model: Any, rank: int, step: int, embedded: bool = True) -> Tensor:
    """`embedded`: the model is given tokens, not what its embedding makes of them."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=generator)
    row = {"input_ids": ids}
    if not embedded:
        row = {"inputs_embeds": torch.ones(1, 24, model.config.hidden_size, dtype=model.dtype)}
    logits = model(**row).logits.double()
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def as_accelerate_shards(model: Any, reduced: torch.dtype, device: str = "cpu") -> None:
    """Layers, embedding, and last norm with output layer are units of their own; a tied embedding
    is of the last one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    keys: dict[str, Any] = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=reduced),
    }
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True, **keys)
    last = [model.model.norm, model.lm_head]
    if tied:
        last.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, reshard_after_forward=True, **keys)
    fully_shard(last, reshard_after_forward=False, **keys)
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


def races(tied: bool, keep: bool, uncopied_bytes: int) -> tuple[list[str], list[set[str]]]:
    """Steps whose streams are simulated: races of FSDP2's gathers with the optimizer's updates; and
    the weights that were gathered beside the update of the step before, of each step.

    The steps are: two plain ones; one without the embedding; a plain one; one of two micro-batches;
    one after an evaluation; one after another whose update was left out; one after the pass of a
    reference.

    Args:
        uncopied_bytes: of weights and gradients that are messages of their own.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
    from torch.distributed.fsdp._fully_shard import _fsdp_state as states

    memory, names = stream_clocks.Memory(), dict[int, str]()
    inputs, gather = collectives._get_param_all_gather_inputs, collectives.DefaultAllGather.__call__

    def copied_in(params: list[Any]) -> Any:
        for param in params:
            memory.read(names[param.sharded_param._local_tensor.data_ptr()])
        return inputs(params)

    def message(self: Any, output_tensor: Tensor, input_tensor: Tensor, **keys: Any) -> Any:
        if input_tensor.data_ptr() in names:  # the shard itself
            memory.read(names[input_tensor.data_ptr()])
        return gather(self, output_tensor, input_tensor, **keys)

    def kernel(parameters: Any, group: Any, step: float, scale: float) -> None:
        for weight, *_ in parameters:
            memory.write(names[weight.data_ptr()])

    def simulated(device: Any) -> Any:
        return stream_clocks.Device

    model: Any = model_of("llama", torch.bfloat16, tied)
    patches: list[tuple[Any, str, Any]] = [
        (collectives, "_get_param_all_gather_inputs", copied_in),
        (collectives.DefaultAllGather, "__call__", message),
        (split_masters, "update_in_one_pass", kernel),
        (SplitAdamW, "_is_one_pass", lambda self, p: True),
        (uncopied, "LEAST_BYTES", uncopied_bytes),
        (torch, "Event", stream_clocks.Event),
        (torch, "get_device_module", simulated),
        # where FSDP2 waits for what was gathered in vain: by a pass before it
        (torch.accelerator, "current_stream", stream_clocks.Device.current_stream),
        *((m, "_get_device_handle", simulated) for m in (collectives, groups, states)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        as_accelerate_shards(model, torch.bfloat16)
        optimizer = SplitAdamW(model.parameters(), placement="gpu")
        gathered.begin(model, MemorySettings(keep_weights=keep), optimizer)
        names |= {local(p).data_ptr(): n for n, p in model.named_parameters()}
        early = []

        def step(number: int, micro_batches: int = 1, embedded: bool = True) -> None:
            for _ in range(micro_batches):
                loss_of(model, dist.get_rank(), number, embedded).backward()
            early.append(set(memory.early))
            memory.early.clear()
            optimizer.step()
            model.zero_grad()

        def look() -> None:
            with torch.no_grad():
                loss_of(model, dist.get_rank(), 7)

        step(0)
        step(1)
        step(2, embedded=False)
        step(3)
        step(4, micro_batches=2)
        look()
        gathered.give_up_weights(model)
        step(5)
        loss_of(model, dist.get_rank(), 6).backward()
        optimizer.zero_grad()
        optimizer.step()
        step(7)
        look()
        step(8)
    return memory.races, early


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
