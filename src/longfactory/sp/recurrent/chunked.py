"""Linear recurrences in chunks, for all documents of a row at once and over all ranks.

    S_t = a_t S_{t-1} + k_t (beta_t v_t)^T                             plain: Mamba 2, lightning
    S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T       delta: gated delta rule, KDA
    o_t = scale S_t^T q_t

with a_t = exp(g_t), one number of a head or one of each key channel. In chunks (Yang et al., arXiv
2412.06464; Dao and Gu, arXiv 2405.21060) the tokens of a chunk are products of matrices, and only
the states of chunks follow one another:

    S' = a S + Kd^T (U - W S)        o = Qd S + P (U - W S)

A stretch of a document that begins on another rank starts from a state that is not here yet. It is
affine in that state, so every rank computes how its own stretches change any state, all ranks
exchange that (a state and a square matrix of each head, whatever the length), and each goes on from
the true states. The backward pass does the same with gradients, from the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import computed
from .fragments import Chunks, Fragments
from .heads import Heads, parts_of
from .passing import first_states, gathered, last_gradients
from .rule import CHUNK, Rule, wide
from .states import Changes


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    rule: Rule,
    fragments: Fragments,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The recurrence over this rank's tokens. Differentiable. Collective where a document crosses
    ranks.

    Args:
        q, k: [T/n, Hk, Dk].
        v: [T/n, H, Dv]; every H / Hk heads share a key head.
        g: [T/n, H] or [T/n, H, Dk]: logarithms of decays, at most 0.
        beta: [T/n, H]; None for 1.
        dtype: of the output; by default that of q.
        skip: [H], times which values are added to the outputs.

    Returns:
        [T/n, H, Dv].
    """
    if beta is None:
        beta = torch.ones_like(g[..., 0] if g.dim() == 3 else g)
    settings = rule, fragments, group, dtype or q.dtype
    out: Tensor = _Recurrence.apply(q, k, v, g, beta, skip, *settings)
    return out


class _Recurrence(torch.autograd.Function):
    """Stores its inputs, and what fragments start from; chunks are computed again backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        skip: Tensor | None,
        rule: Rule,
        fragments: Fragments,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
    ) -> Tensor:
        inputs = [q, k, v, g, beta]
        chunks = fragments.chunks(CHUNK, q.device)
        start, matrix = None, None
        with torch.autocast(q.device.type, enabled=False):
            kernels = computed.by_kernels(inputs, rule, skip is not None)
            parts = list(parts_of(inputs, rule, chunks, kernels, False))
            made = _made_once(inputs, rule, chunks, kernels, len(parts) == 1)
            if fragments.open:
                mine = _changes(inputs, rule, fragments, chunks, parts, made)
                every = gathered(mine, fragments, group)
                start, matrix = first_states(every, fragments), every.matrix
            out = v.new_empty(v.shape, dtype=dtype)
            for part in parts:
                first = _start(start, part, chunks, inputs)
                heads = slice(part.start, part.stop)
                added = None if skip is None else skip[heads]
                computed.forward(made(part), chunks, first, out[:, heads], v[:, heads], added)
        ctx.save_for_backward(*inputs, skip, start, matrix)
        ctx.settings = rule, fragments, group, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, skip, start, matrix = ctx.saved_tensors
        rule, fragments, group, kernels = ctx.settings
        chunks = fragments.chunks(CHUNK, grad.device)
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            parts = list(parts_of(inputs, rule, chunks, kernels, True))
            # By PyTorch, the gradients make their own.
            alone = kernels and len(parts) == 1
            made = _made_once(inputs, rule, chunks, kernels, alone)
            ends, slopes = None, None
            if fragments.open:
                d_first = torch.empty_like(start)
                for part in parts:
                    slopes = computed.slopes(made(part), chunks, grad[:, part.start : part.stop])
                    found = computed.first_gradients(made(part), chunks, *slopes)
                    mine = d_first[:, part.start : part.stop]
                    mine.index_copy_(0, chunks.index(chunks.order), found)
                ends = last_gradients(d_first, matrix, fragments, group)
            if not alone:
                slopes = None
            grads: list[Tensor] = []
            d_skips: list[Tensor] = []
            if len(parts) > 1:
                grads = [torch.zeros_like(x) for x in inputs]
            for part in parts:
                first = _start(start, part, chunks, inputs)
                d_after = torch.zeros_like(first)
                if ends is not None and fragments.open_local:
                    at = chunks.index([chunks.rank_of[i] for i in fragments.open_local])
                    mine = ends[:, part.start : part.stop].to(d_after.dtype)
                    d_after.index_copy_(0, at, mine)
                given = first, grad[:, part.start : part.stop], d_after
                job = made(part) if kernels else None
                added = None if skip is None else skip[part.start : part.stop]
                found = computed.gradients(
                    part.inputs(inputs), rule, chunks, *given, job, slopes, added
                )
                d_skips += found[5:]
                if len(parts) == 1:
                    grads = [one.to(x.dtype) for one, x in zip(found, inputs, strict=False)]
                    break
                for total, one in zip(part.inputs(grads), found, strict=False):
                    total.add_(one)
        d_skip = None if skip is None else torch.cat(d_skips).to(skip.dtype)
        return (*grads, d_skip, None, None, None, None)


def _made_once(
    inputs: list[Tensor], rule: Rule, chunks: Chunks, kernels: bool, alone: bool
) -> Callable[[Heads], Any]:
    """Makes what the chunks of a part need of their own tokens: a job of the kernels, or `Within`.

    Args:
        alone: the part has all heads, and what is made is kept. Several parts' would not fit: it
            is made anew each time.
    """

    @functools.lru_cache(maxsize=int(alone))
    def made(part: Heads) -> Any:
        return computed.make(part.inputs(inputs), rule, chunks, kernels)

    return made


def _start(start: Tensor | None, part: Heads, chunks: Chunks, inputs: list[Tensor]) -> Tensor:
    """[F, h, Dk, Dv] in the order of the chunks' fragments."""
    _, k, v, _, _ = inputs
    if start is None:
        heads = part.stop - part.start
        return v.new_zeros(len(chunks.order), heads, k.shape[2], v.shape[2], dtype=wide(v))
    return start[:, part.start : part.stop].index_select(0, chunks.index(chunks.order))


def _changes(
    inputs: list[Tensor],
    rule: Rule,
    fragments: Fragments,
    chunks: Chunks,
    parts: list[Heads],
    made: Callable[[Heads], Any],
) -> Changes:
    """Of this rank's open fragments, in the order of `open_local`."""
    _, k, v, g, _ = inputs
    heads, key_dim, value_dim = v.shape[1], k.shape[2], v.shape[2]
    count = len(fragments.open_local)
    decays = key_dim if g.dim() == 3 else 1
    size = (key_dim, key_dim) if rule.kind == "delta" else (decays, 1)
    state = v.new_zeros(count, heads, key_dim, value_dim, dtype=wide(v))
    matrix = v.new_zeros(count, heads, *size, dtype=wide(v))
    if not count:
        return Changes(state, matrix)
    at = [chunks.rank_of[i] for i in fragments.open_local]
    chosen = sorted(at)
    order = chunks.index([chosen.index(place) for place in at])
    for part in parts:
        found = computed.changes_of(made(part), chunks, chosen)
        state[:, part.start : part.stop] = found.state.index_select(0, order)
        matrix[:, part.start : part.stop] = found.matrix.index_select(0, order)
    return Changes(state, matrix)
