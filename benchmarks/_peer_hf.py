"""The row of `_peers.py` that runs Hugging Face's layers."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from _peer_bench import Bench
from _peer_steps import NoteKernels, finish_step, make_optimizer, shard
from longfactory import sp
from longfactory.sp import hf


def hf_recipe(bench: Bench) -> None:
    """Hugging Face's layers and checkpointing with full logits; the ring, the sharding and the
    optimizer are ours.
    """
    job = bench.job
    NoteKernels(bench)
    ctx = sp.SequenceParallel.create(
        bench.world, mode=job.mode, backend=job.kernel, device_type=bench.device.type
    )
    model = bench.model(hf.ATTENTION)
    hf.prepare(model, ctx)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if bench.world > 1:
        shard(bench, model)
    optimizer = (
        make_optimizer(bench, model, job.settings.get("optimizer", "gpu"))
        if job.optimizer
        else None
    )

    def step(tokens: int) -> tuple[float, dict[str, float]]:
        start = bench.sync()
        ids, labels = bench.row(tokens, model.config.vocab_size)
        plan = sp.plan(tokens, None, ctx)
        row = {
            "input_ids": ids.to(bench.device),
            "position_ids": torch.arange(tokens, device=bench.device),
        }
        logits = model(**hf.inputs(row, plan)).logits[0].float()
        mine = labels[plan.index].to(bench.device)
        loss = (
            F.cross_entropy(logits, mine, reduction="sum", ignore_index=-100)
            * bench.world
            / (tokens - 1)
        )
        del logits
        value, parts = finish_step(bench, model, optimizer, loss, start)
        total = torch.tensor(value / bench.world, device=bench.device)
        if bench.world > 1:
            dist.all_reduce(total)
        return float(total), parts

    bench.measure(step)
