"""Masks of rows, and attention by a schedule compared with plain attention, on each of the ranks."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from longfactory import sp
from longfactory.sp import Segment
from plain_attention import context, plain_attention, plain_mask, random_inputs

plans: Any = sys.modules["longfactory.sp.plan"]  # sp.plan itself is the function
LENGTH = 96


ONE = (Segment(0, LENGTH),)


PACKED = (Segment(0, 30), Segment(30, 30), Segment(30, 31), Segment(31, 70), Segment(70, LENGTH))


# One document over the first two chunks of eight, the others inside chunks: the ring stops after
# one step of three.
EARLY = (Segment(0, 24), *(Segment(12 * c, 12 * c + 12) for c in range(2, 8)))


BRANCHES = (
    Segment(0, 40),
    Segment(40, 52, 0),
    Segment(52, 75, 0),
    Segment(75, 80, 2),
    Segment(80, LENGTH),
)


MASKS: dict[str, dict[str, Any]] = {
    "one document": {"segments": ONE},
    "packed": {"segments": PACKED},
    "early end": {"segments": EARLY},
    "branches": {"segments": BRANCHES},
    "window": {"segments": ONE, "window": 11},
    "packed window": {"segments": PACKED, "window": 7},
    "branches window": {"segments": BRANCHES, "window": 25},
    "chunked": {"segments": PACKED, "chunk": 16},
    "branches chunked": {"segments": BRANCHES, "chunk": 16},
    "sinks": {"segments": ONE, "sinks": True},
    "packed window sinks": {"segments": PACKED, "window": 7, "sinks": True},
    "softcap": {"segments": PACKED, "softcap": 2.0},
}


def compare(
    mode: str,
    ulysses: int | None,
    segments: tuple[Segment, ...],
    heads: int = 8,
    kv_heads: int = 2,
    dim: int = 8,
    v_dim: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    auto_heads: bool = False,
    fetch: bool = False,
) -> dict[str, float]:
    """Largest difference from plain attention, by tensor. Runs on every rank. `fetch`: a ring may
    give way to a fetch.
    """
    plans.FETCH_BELOW = 0.5 if fetch else -1.0
    ctx = context(
        mode, ulysses, heads=heads if auto_heads else None, kv=kv_heads if auto_heads else None
    )
    length = segments[-1].stop
    plan = sp.plan(length, segments, ctx)
    q, k, v, dout = random_inputs(length, heads, kv_heads, dim, v_dim)
    leaves = {"dq": q, "dk": k, "dv": v}
    if sinks:
        leaves["dsinks"] = torch.linspace(-1, 2, heads, dtype=torch.float64)
    plain = {n: x.clone().requires_grad_() for n, x in leaves.items()}
    ours = {n: x.clone().requires_grad_() for n, x in leaves.items()}

    mask = plain_mask(segments, length, window, chunk)
    expected = plain_attention(
        plain["dq"], plain["dk"], plain["dv"], mask, 0.3, softcap, plain.get("dsinks")
    )
    expected.backward(dout)

    local = [sp.shard(ours[n], plan) for n in ("dq", "dk", "dv")]
    out = sp.attention(
        *local,
        plan,
        scale=0.3,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=ours.get("dsinks"),
    )
    assert out.is_contiguous() and out.dtype == torch.float64
    out.backward(sp.shard(dout, plan))
    errors = {"out": (sp.gather(out.detach(), plan) - expected).abs().max().item()}
    for n, x in ours.items():
        dist.all_reduce(x.grad)
        errors[n] = (x.grad - plain[n].grad).abs().max().item()
    return errors
