"""The engine's attention alone against plain attention, on random numbers."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from .. import compare
from ..attention import attention as engine
from ..collectives import all_reduce, gather, shard
from ..probe import Asked, Probe, Shape
from .fixed import exact_matmul
from .row import Row, zero_padding
from .words import short, text_of, times_as_far, worst

log = logging.getLogger(__name__)


def attention_differs(seen: Probe, rows: list[Row], device: torch.device) -> str | None:
    """Every kind of call that the layers make, on random numbers: scores are as large as they must
    be for each setting to matter, which those of a model may not be. Collective over the
    sequence-parallel group."""
    reasons = []
    for (asked, shape), row in itertools.product(sorted(seen.kernels, key=str), rows):
        found = attention_ratios(asked, shape, row, device)
        log.debug("guard: attention of %s, %s: %s", asked, shape, found)
        what, ratio = worst(found)
        if not ratio <= compare.limit(shape.dtype):
            reasons.append(
                f"the {what} of the engine's attention ({text_of({asked})}, {shape.heads} and"
                f" {shape.kv_heads} heads of {shape.dim}) is {times_as_far(ratio, shape.dtype)} as"
                f" that of plain attention in {short(shape.dtype)}"
            )
    return reasons[0] if reasons else None


def attention_ratios(
    asked: Asked, shape: Shape, row: Row, device: torch.device
) -> dict[str, float]:
    """Ratios of the engine's output and gradients. Collective over the sequence-parallel group."""
    # Standard deviation of the scores: small, where half precision rounds least, and where a
    # soft-cap bends them.
    spreads = (1.0, asked.softcap / 4) if asked.softcap else (1.0,)
    every = [_attention_ratios(asked, shape, row, device, spread) for spread in spreads]
    return {
        what: worst({str(i): found[what] for i, found in enumerate(every)})[1] for what in every[0]
    }


def _attention_ratios(
    asked: Asked, shape: Shape, row: Row, device: torch.device, spread: float
) -> dict[str, float]:
    total, draw = row.plan.length, torch.Generator().manual_seed(2)
    sizes = {
        "q": (shape.heads, shape.dim),
        "k": (shape.kv_heads, shape.dim),
        "v": (shape.kv_heads, shape.value_dim),
    }
    whole = {
        name: torch.randn(total, *size, generator=draw).to(device) for name, size in sizes.items()
    }
    whole["q"] *= spread / (asked.scale * math.sqrt(shape.dim))
    slope = torch.randn(total, shape.heads, shape.value_dim, generator=draw).to(device)
    zero_padding(slope, row)
    whole = {name: x.to(shape.dtype) for name, x in whole.items()}
    # Sinks that take about half of a token's probability.
    sinks = (
        torch.full((shape.heads,), math.log(32.0) + spread, device=device, dtype=shape.dtype)
        if asked.sinks
        else None
    )

    q, k, v = (shard(x, row.plan).clone().requires_grad_() for x in whole.values())
    settings: dict[str, Any] = {
        "scale": asked.scale,
        "window": asked.window,
        "chunk": asked.chunk,
        "softcap": asked.softcap,
    }
    mine = None if sinks is None else sinks.clone().requires_grad_()
    with torch.enable_grad():
        out = engine(q, k, v, row.plan, **settings, sinks=mine)
    grads = torch.autograd.grad(
        out, [q, k, v, *([] if mine is None else [mine])], shard(slope, row.plan).to(out.dtype)
    )
    run = {
        name: gather(t.detach(), row.plan)[row.span]
        for name, t in zip(("out", "q", "k", "v"), (out, *grads), strict=False)
    }
    if mine is not None:
        run["sinks"] = all_reduce(
            grads[3].to(compare.reference_dtype(shape.dtype)), row.plan.ctx.group
        )
    own = _plain(whole, sinks, slope, asked, row, shape.dtype)
    with exact_matmul():
        reference = _plain(whole, sinks, slope, asked, row, compare.reference_dtype(shape.dtype))
    unit = compare.rounding(shape.dtype)
    found = {}
    for name in ("out", "q", "k", "v"):
        what = "output" if name == "out" else f"gradient of {name}"
        found[what] = compare.token_ratio(run[name], own[name], reference[name], row.lengths, unit)
    if mine is not None:
        found["gradient of the sinks"] = compare.weight_ratio(
            run["sinks"], own["sinks"], reference["sinks"], unit
        )
    return found


def _plain(
    whole: dict[str, Tensor],
    sinks: Tensor | None,
    slope: Tensor,
    asked: Asked,
    row: Row,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Plain attention and its gradients, each document alone, in `dtype`."""
    inputs = {name: x[row.span].to(dtype).requires_grad_() for name, x in whole.items()}
    if sinks is not None:
        inputs["sinks"] = sinks.to(dtype).clone().requires_grad_()
    with torch.enable_grad():
        documents = zip(*(inputs[name].split(row.lengths) for name in ("q", "k", "v")), strict=True)
        out = torch.cat(
            [compare.plain_attention(q, k, v, asked, inputs.get("sinks")) for q, k, v in documents]
        )
    grads = torch.autograd.grad(out, list(inputs.values()), slope[row.span].to(dtype))
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}
