"""What the ranks of tests/memory/test_uncopied.py run."""

from __future__ import annotations

import collections
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import gathered_ranks
from longfactory.memory import gathered, uncopied
from longfactory.memory.settings import MemorySettings
from longfactory.testing import tiny_model

Steps = tuple[list[dict[str, Tensor]], dict[str, int], dict[str, int]]


def steps_of(kind: str, dtype: torch.dtype, keep: bool, least: int, lora: bool) -> Steps:
    """Two steps of two micro-batches each, a look at other data between them, with tensors of
    `least` bytes as messages of their own.

    Returns:
        The loss, the whole gradients and the weights after each step; how many messages there were
        of weights and of gradients, of both steps; how often a hook of each gradient was called.
    """
    torch.manual_seed(0)
    # 65 rows are not divided evenly by two
    model: Any = tiny_model(kind, dtype=dtype, tie_word_embeddings=False, vocab_size=65).train()
    model.set_experts_implementation("eager")
    if lora:
        model = with_adapters(model)
    else:
        model.model.layers[1].mlp.requires_grad_(False)
    gathered_ranks.as_accelerate_shards(model, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gathered.begin(model, MemorySettings(keep_weights=keep))
    messages: dict[str, int] = collections.Counter()
    hooks: dict[str, int] = collections.Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: hooks.update([name]))
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as of_torch

    def counted(of: type, name: str) -> Any:
        call = of.__call__

        def counts(self: Any, *args: Any, **kwargs: Any) -> Any:
            messages[name] += 1
            return call(self, *args, **kwargs)

        return mock.patch.object(of, "__call__", counts)

    found = []
    with (
        mock.patch.object(uncopied, "LEAST_BYTES", least),
        counted(of_torch.DefaultAllGather, "weights"),
        counted(of_torch.DefaultReduceScatter, "gradients"),
    ):
        for step in range(2):
            losses = []
            for micro_batch in range(2):
                loss = loss_of(model, 2 * step + micro_batch)
                loss.backward()
                losses.append(loss.detach())
            values = {"loss": torch.stack(losses)}
            values |= {
                f"gradient of {n}": p.grad.full_tensor().clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                loss_of(model, 7)
            gathered.give_up_weights(model)
            values |= {n: p.full_tensor().clone() for n, p in model.named_parameters()}
            found.append({n: v.detach() for n, v in values.items()})
    return found, dict(messages), dict(hooks)


def loss_of(model: Any, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=generator)
    logits = model(input_ids=ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def with_adapters(model: Any) -> Any:
    """LoRA on all linear maps of the layers, routed experts included, B not zero. Returns the model
    itself, in which they are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    experts = [n for n, _ in model.named_parameters() if n.endswith(("up_proj", "down_proj"))]
    config = LoraConfig(r=4, target_modules="all-linear", target_parameters=experts or None)
    model = inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def both_ways(kind: str, dtype: torch.dtype, keep: bool, lora: bool) -> tuple[Steps, Steps]:
    """All tensors copied, and all but the norms messages of their own where that can be."""
    return steps_of(kind, dtype, keep, 1 << 60, lora), steps_of(kind, dtype, keep, 512, lora)
