"""The functions of transformers' modules that mixers run with: a convolution and a recurrence, with
the arguments that transformers gives them, of a row whose plan comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..plan import RowPlan
from .convolution import convolution
from .exchange import over_ranks
from .fragments import fragments_of
from .rule import Rule, wide

CHANNELS = 512
"""Channels of a Mamba layer that are computed at once."""


def convolved(
    plan: RowPlan,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """[1, C, T/n] -> [1, C, T/n]."""
    out = convolution(
        hidden_states[0].t(), weight, bias, activation, fragments_of(plan), plan.ctx.group
    )
    return out.t()[None]


def delta_rule(
    plan: RowPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T/n, H, D] -> [1, T/n, H, Dv]."""
    _no_state(initial_state, output_final_state)
    rule = Rule("delta", query.shape[-1] ** -0.5, use_qk_l2norm_in_kernel)
    out = over_ranks(query[0], key[0], value[0], g[0], beta[0], rule, plan, query.dtype)
    return out[None], None


def mamba2(
    plan: RowPlan,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Tensor:
    """[1, T/n, H, P] -> [1, T/n, H, P] in the wide type, as transformers' own."""
    _no_state(initial_states, return_final_states)
    if z is not None:
        raise ValueError("a Mamba 2 layer gates inside its scan, which is not implemented.")
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(dt_limit[0], dt_limit[1])[0]
    dtype = wide(hidden_states)
    x, dt = hidden_states[0], dt.to(dtype)
    out = over_ranks(C[0], B[0], x, A.to(dtype) * dt, dt, Rule("plain", 1.0), plan, dtype, D)
    return out[None]


def mamba1(
    plan: RowPlan,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor:
    """[1, I, T/n] -> [1, I, T/n]: every channel is a head of one value, with a decay of each number
    of its state.
    """
    _no_state(None, return_last_state)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    dtype = wide(hidden_states)
    # [1, I, T/n] -> [T/n, I]; [1, N, T/n] -> [T/n, 1, N]
    x, dt = hidden_states[0].t(), dt[0].t().to(dtype)
    keys, queries = B[0].t()[:, None], C[0].t()[:, None]

    def some(x: Tensor, dt: Tensor, A: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        g = dt[..., None] * A.to(dtype)
        rule = Rule("plain", 1.0)
        return over_ranks(queries, keys, x[..., None], g, dt, rule, plan, dtype)[..., 0]

    # The decays are as many numbers as all states of all tokens: those of some channels at a time.
    parts = zip(x.split(CHANNELS, 1), dt.split(CHANNELS, 1), A.split(CHANNELS), strict=True)
    outputs = [
        checkpoint(some, *part, keys, queries, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]
    out = torch.cat(outputs, 1)
    if D is not None:
        out = out + x * D
    out = out.t()[None]
    return out if z is None else out * F.silu(z)


def _no_state(initial: Tensor | None, final: bool) -> None:
    if initial is not None or final:
        raise ValueError(
            "a recurrence is asked to start from a cached state or to return one. Call the model"
            " with hf.inputs(row, plan)."
        )


def nothing(plan: RowPlan, *args: Any, **kwargs: Any) -> None:
    """A fused form, which mixers try first in training: None lets them go on with their parts."""


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolved,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": mamba2,
    "mamba_selective_scan": mamba1,
    "mamba2_split_conv1d_scan_combined": nothing,
    "mamba_inner_fn": nothing,
}
"""Functions of transformers' modules, by their names there."""

NAMES = {
    "torch_chunk_gated_delta_rule": "gated delta net",
    "chunk_kimi_delta_attention": "Kimi delta attention",
    "mamba2_chunk_scan": "Mamba 2",
    "mamba_selective_scan": "Mamba",
}
"""Of recurrences, by those functions."""
