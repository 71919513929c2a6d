"""Exact attention of one row that is sharded over several processes. Imports torch, and of this
project only the list of kernel names.

    import torch, torch.distributed as dist
    from longfactory import sp

    dist.init_process_group()
    ctx = sp.SequenceParallel.create(size=2, mode="zigzag-ring")
    T = 4096  # a multiple of sp.alignment(ctx)
    plan = sp.plan(T, [sp.Segment(0, 1000), sp.Segment(1000, T)], ctx)
    x = sp.shard(tokens, plan)  # [T, ...] -> [T/n, ...]; plan.index: their positions in the row
    q, k, v = project(x)  # [T/n, H, D], [T/n, Hk, D], [T/n, Hk, D]
    out = sp.attention(q, k, v, plan)  # [T/n, H, D], differentiable
    logps = sp.gather(head(out), plan)  # [T], on every rank

The sum over ranks of a parameter's gradients is the gradient of the sum over ranks of their losses.
"""

from .attention import (
    attention,
    attention_backward,
    attention_backward_in_parts,
    attention_forward,
)
from .collectives import all_gather, all_reduce, all_to_all, gather, reduce_scatter, shard
from .context import MODES, SequenceParallel, alignment
from .layout import Segment
from .plan import RowPlan, plan
from .replay import keep

__all__ = [
    "MODES",
    "RowPlan",
    "Segment",
    "SequenceParallel",
    "alignment",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attention",
    "attention_backward",
    "attention_backward_in_parts",
    "attention_forward",
    "gather",
    "keep",
    "plan",
    "reduce_scatter",
    "shard",
]
