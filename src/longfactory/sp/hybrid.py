"""Layers that are not softmax attention: gated delta nets (Qwen3-Next, Qwen3.5) run over an
exchange of heads, others are refused.

A gated delta net (Yang et al., arXiv 2412.06464) is a short convolution of each channel and a
recurrence of each head along the document. Both are independent between heads, so the ranks
exchange tokens for heads, as in Ulysses: each runs a share of the heads over the whole row, and
hands the tokens back. Two exchanges a layer, and no rank waits for another's state. The memory of a
rank is that of T tokens of H/n heads.

    x [T/n, H, D] -> [T, H/n, D] -> convolution, recurrence, document by document -> [T/n, H, D]
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import probe
from .collectives import all_to_all
from .context import SequenceParallel
from .hooks import ModelHooks
from .layout import Segment
from .plan import RowPlan

LAYERS = frozenset({"linear_attention"})
"""Layer types that are computed here, in models whose linear attention is a gated delta net of
Qwen's shape.
"""

GATED_DELTA_NETS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
_GATED_DELTA_MODELS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")

_KNOWN = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "sparse", "dense", "moe", "mlp"}
)
_STATE = (
    "its linear-attention or state-space layers carry a state along the document, from one rank's"
    " tokens to another's"
)
_INDEXER = "its sparse attention chooses keys from the whole row by an indexer"
_REASONS = {
    "linear_attention": _STATE,
    "hybrid": _STATE,
    "hybrid_sliding": _STATE,
    "conv": "its short convolutions read tokens of another rank at the ends of a shard",
    "indexed_attention": _INDEXER,
    "deepseek_sparse_attention": _INDEXER,  # older names of it
    "qwen_sparse_attention": _INDEXER,
    "minimax_m3_sparse": _INDEXER,
    "compressed_sparse_attention": (
        "its attention reads a compressed copy of the keys of the whole row"
    ),
    "heavily_compressed_attention": (
        "its attention reads a compressed copy of the keys of the whole row"
    ),
}


def unsupported(config: Any) -> str | None:
    """Why layers of this configuration cannot be computed, or None."""
    for kind in dict.fromkeys(getattr(config, "layer_types", None) or ()):
        if kind in _KNOWN or (kind in LAYERS and config.model_type in _GATED_DELTA_MODELS):
            continue
        return _REASONS.get(kind, f"layers of type {kind} are unknown to the engine")
    return None


def prepare(model: nn.Module, ctx: SequenceParallel, hooks: ModelHooks) -> None:
    """Gives every gated delta net its forward over the exchange of heads.

    Raises:
        ValueError: its key heads do not divide by the size of the sequence-parallel group.
    """
    for module in model.modules():
        if type(module).__name__ not in GATED_DELTA_NETS:
            continue
        if module.num_k_heads % ctx.size:
            raise ValueError(
                f"{type(module).__name__} has {module.num_k_heads} key heads, which do not divide"
                f" over sequence_parallel_size {ctx.size}. Use a size that divides"
                f" {module.num_k_heads}."
            )
        hooks.replace_forward(module, _forward)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the forward of a gated delta net on the instance. Without a plan: that of its
    class.
    """
    plan: RowPlan | None = kwargs.get("sp_plan")
    if plan is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if kwargs.get("attention_mask") is not None or kwargs.get("cache_params") is not None or args:
        raise ValueError(
            f"{type(self).__name__}: masks and caches are not supported. Call the model with"
            " hf.inputs(row, plan)."
        )
    if (seen := probe.current()) is not None:
        seen.linear.add(id(self))
    q, k, v, z, b, a = _project(self, hidden_states[0])
    beta = b.sigmoid()
    # As in transformers: A may overflow in half precision.
    decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
    n, rank = plan.ctx.size, plan.ctx.rank
    # Each rank's share of the heads of q, k and v, side by side, so that one exchange carries all
    # three.
    widths = [self.key_dim // n, self.key_dim // n, self.value_dim // n]
    mixed = torch.cat([x.reshape(x.shape[0], n, -1) for x in (q, k, v)], dim=-1)
    mixed = _to_heads(mixed, plan)
    gates = _to_heads(
        torch.stack([decay, beta.float()], dim=-1).reshape(decay.shape[0], n, -1), plan
    )
    decay, beta = gates.reshape(plan.length, -1, 2).unbind(-1)
    beta = beta.to(b.dtype)

    weight = _own_channels(self.conv1d.weight.squeeze(1), self, n, rank)
    bias = None if self.conv1d.bias is None else _own_channels(self.conv1d.bias, self, n, rank)
    code = sys.modules[type(self).__module__]
    outputs = []
    for segment, before in zip(plan.segments, _before(plan.segments), strict=True):
        if segment.stop == segment.start:
            continue
        first = sum(stop - start for start, stop in before)

        def rows(
            x: Tensor, segment: Segment = segment, before: list[tuple[int, int]] = before
        ) -> Tensor:
            return (
                torch.cat(
                    [x[start:stop] for start, stop in (*before, (segment.start, segment.stop))]
                )[None]
                if before
                else x[None, segment.start : segment.stop]
            )

        # [1, S, C] -> [1, C, S] -> [1, S, C]
        convolved = code.causal_conv1d_fn(
            rows(mixed).transpose(1, 2), weight, bias, activation=self.activation
        ).transpose(1, 2)
        query, key, value = convolved.split(widths, dim=-1)
        repeats = self.num_v_heads // self.num_k_heads
        query, key = (
            x.unflatten(-1, (-1, self.head_k_dim)).repeat_interleave(repeats, dim=2)
            for x in (query, key)
        )
        value = value.unflatten(-1, (-1, self.head_v_dim))
        out, _ = code.torch_chunk_gated_delta_rule(
            query,
            key,
            value,
            g=rows(decay),
            beta=rows(beta),
            initial_state=None,
            output_final_state=False,
            use_qk_l2norm_in_kernel=True,
        )
        outputs.append(out[0, first:])
    # [T, H/n, D] -> [T/n, H, D]
    core = _to_rows(torch.cat(outputs), plan)
    core = self.norm(core.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
    return self.out_proj(core.reshape(1, plan.local_length, -1))


def _project(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """[T/n, h] -> q, k [T/n, Hk * Dk], v, z [T/n, Hv * Dv], b, a [T/n, Hv]."""
    if hasattr(self, "in_proj_qkvz"):
        parts = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(x[None]), self.in_proj_ba(x[None])
        )
        q, k, v, z, b, a = (p[0] for p in parts)
        return q.flatten(1), k.flatten(1), v.flatten(1), z.flatten(1), b, a
    q, k, v = self.in_proj_qkv(x).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    return q, k, v, self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)


def _own_channels(x: Tensor, self: Any, n: int, rank: int) -> Tensor:
    """[2 * Hk * Dk + Hv * Dv, ...] -> this rank's channels of q, of k and of v."""
    parts = x.split([self.key_dim, self.key_dim, self.value_dim])
    return torch.cat([p.chunk(n)[rank] for p in parts])


def _before(segments: tuple[Segment, ...]) -> list[list[tuple[int, int]]]:
    """Rows of each segment's ancestors, the first one first: a branch starts from the state at its
    parent's end.
    """
    out: list[list[tuple[int, int]]] = []
    for s in segments:
        parent = segments[s.parent] if s.parent >= 0 else None
        out.append([*out[s.parent], (parent.start, parent.stop)] if parent is not None else [])
    return out


_orders: weakref.WeakKeyDictionary[RowPlan, dict[torch.device, tuple[Tensor, Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def _order(plan: RowPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T] positions of the ranks' tokens laid end to end, and the inverse. Copied to the device
    once for all layers.
    """
    held = _orders.setdefault(plan, {})
    if device not in held:
        order = torch.cat(
            [
                torch.arange(start, stop)
                for intervals in plan.layout.intervals
                for start, stop in intervals
            ]
        )
        held[device] = (order.to(device), order.argsort().to(device))
    return held[device]


def _to_heads(x: Tensor, plan: RowPlan) -> Tensor:
    """[T/n, n, C] -> [T, C]: part r of each token goes to rank r; rows in natural order."""
    received = all_to_all(x.transpose(0, 1), plan.ctx.group)
    # [n, T/n, C] -> [T, C]
    return received.flatten(0, 1).index_select(0, _order(plan, x.device)[1])


def _to_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """[T, H/n, D] -> [T/n, H, D]: the way back."""
    n = plan.ctx.size
    sent = x.index_select(0, _order(plan, x.device)[0]).unflatten(0, (n, plan.local_length))
    # [n, T/n, H/n, D] -> [T/n, n * H/n, D]
    return all_to_all(sent, plan.ctx.group).transpose(0, 1).flatten(1, 2)
