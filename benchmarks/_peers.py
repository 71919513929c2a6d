"""One row of the throughput and length tables: complete training steps of one system, at several
lengths, in processes of its own.

Run by `throughput.py` and `length.py`, one process a GPU, with a job as JSON (see `Job`). Every
process builds the model on its device with random weights, trains at each length in turn, and
prints a line `RESULT {...}` for each, so that what was measured before memory ran out is not lost.

Rows:
    ours            longfactory: memory: auto (the keys of `settings` on top), its own layer function
    ours-generic    the same with Hugging Face's layer code in pieces
    ours-recompute  the same with attention computed twice
    ours-overlap    the same with AdamW on the host, nothing clipped, and weights updated while backward runs
    dpo             ours on one preference pair: a row [prompt | chosen | rejected] of T tokens, 95 % of it the prompt that both answers
                    share, made, split and summed by the trainer's functions; sigmoid loss; the reference's log-probabilities are given,
                    as in every step of a run with `precompute_ref_log_probs`
    hf              Hugging Face layers and checkpointing, zigzag ring, full fp32 logits; the same sharding and optimizer as ours
    ulysses, alst   DeepSpeed: UlyssesSPAttentionHF and ZeRO-3; alst adds TiledMLP and the tiled loss. Need the package deepspeed
    alst-bf16       alst with master weights, gradients and states of the optimizer in bf16, which is not the exact trajectory
    rates           this GPU's rates: matrix products of the model's shapes, attention forward and backward at each length
    slope           some layers only, no optimizer: how peak memory grows with length

Attention kernels. DeepSpeed's rows call PyTorch's sdpa on the whole sequence and a share of the
heads: with is_causal, without a mask (DeepSpeed drops it, sdpa ignores position ids) and without
repeated keys (enable_gqa), so that every fused kernel may be taken. On Hopper PyTorch takes
cuDNN's, the kernel that `auto` takes for our rows, so `alst` is also ALST with our kernel;
`alst:flash` forbids it that one. Every result names the kernels that ran: ours as the engine logs
them, theirs as PyTorch chooses for the tensors of each call.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from _peer_bench import DEEPSPEED, SHAPES, Bench, Job

OURS = ("ours", "ours-generic", "ours-recompute", "ours-overlap", "slope", "dpo")


def rates(bench: Bench) -> None:
    """What this GPU's kernels reach: the roofline is made of these."""
    from longfactory import sp

    shape = SHAPES[bench.job.shape]
    h, f, heads, kv = (
        shape[k]
        for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    dim, dtype = h // heads, torch.bfloat16
    ctx = sp.SequenceParallel.create(1, backend=bench.job.kernel, device_type=bench.device.type)

    def timed(work: Callable[[], Any], repeats: int) -> float:
        work()
        start = bench.sync()
        for _ in range(repeats):
            work()
        return (bench.sync() - start) / repeats

    rows = 8192 if bench.cuda else 64
    flops = seconds = 0.0
    for n, m in ((h, h), (h, f), (f, h)):
        a, b = (
            torch.randn(rows, n, device=bench.device, dtype=dtype),
            torch.randn(n, m, device=bench.device, dtype=dtype),
        )
        seconds += timed(lambda a=a, b=b: a @ b, 20 if bench.cuda else 1)
        flops += 2.0 * rows * n * m
    gemm = flops / seconds
    for tokens in bench.job.tokens:
        bench.tokens = tokens
        # Rates are the same above this length, and one call takes seconds.
        measured = min(tokens, 131072)
        plan = sp.plan(measured, None, ctx)
        q = torch.randn(measured, heads, dim, device=bench.device, dtype=dtype)
        k, v = (torch.randn(measured, kv, dim, device=bench.device, dtype=dtype) for _ in range(2))
        out, lse = sp.attention_forward(q, k, v, plan)
        repeats = max(1, int(3e14 / (2.0 * measured**2 * heads * dim))) if bench.cuda else 1
        forward = timed(lambda: sp.attention_forward(q, k, v, plan), min(repeats, 20))
        backward = timed(
            lambda: sp.attention_backward(out, q, k, v, out, lse, plan), min(repeats, 20)
        )
        area = 2.0 * measured**2 * heads * dim
        bench.say(
            gemm=gemm,
            attention_forward=area / forward,
            attention_backward=2.5 * area / backward,
            measured_at=measured,
        )


def body_of(row: str) -> Callable[[Bench], None]:
    """What a row runs; DeepSpeed's processes import nothing of LongFactory's."""
    if row == "rates":
        return rates
    if row in DEEPSPEED:
        from _peer_deepspeed import deepspeed_row

        return deepspeed_row
    if row == "hf":
        from _peer_hf import hf_recipe

        return hf_recipe
    if row in OURS:
        from _peer_ours import ours

        return ours
    raise ValueError(f"no row {row!r}")


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    bench = Bench(job)
    try:
        if job.row not in DEEPSPEED:
            bench.open_group()
        body_of(job.row)(bench)
    except (torch.OutOfMemoryError, MemoryError) as error:
        bench.say(error="out of memory", detail=str(error).splitlines()[0][:300])
        sys.stdout.flush()
        os._exit(3)  # others may wait in a collective: leaving at once lets the launcher end them
    except BaseException as error:
        traceback.print_exc()
        bench.say(
            error=(
                f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            )
        )
        sys.stdout.flush()
        os._exit(4)
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
