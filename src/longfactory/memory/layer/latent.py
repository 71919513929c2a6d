"""Queries, keys and values of multi-head latent attention, before rotary embedding, and their
backward.

    queries  Wqb norm(Wqa n), or Wq n
    keys, values  of norm(first part of Wa n) by Wb; the last part of Wa n is one more part of each
                  head's key, the same for all heads, and turns
"""

from __future__ import annotations

import torch
from torch import Tensor

from longfactory.memory.layer.linears import (
    LayerCall,
    Sums,
    columns_of,
    linear,
    normed,
    normed_backward,
    through,
)
from longfactory.memory.layer_ops import wide


def query_heads(n: Tensor, call: LayerCall, heads: slice) -> Tensor:
    """[C, H] -> [C, heads, D] of some heads."""
    dim = call.shape.head_dim
    rows = columns_of(heads, dim)
    if call.shape.latent is not None and call.shape.latent.query_rank:
        narrow = normed(linear(n, call, "q_a"), call, "q_a_norm")
        return linear(narrow, call, "q_b", rows).view(n.shape[0], -1, dim)
    return linear(n, call, "q", rows).view(n.shape[0], -1, dim)


def _narrow(n: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
    """[C, rank] before its norm, and the shared part of keys, [C, R]."""
    assert call.shape.latent is not None
    made = linear(n, call, "kv_a")
    return made[:, : call.shape.latent.rank], made[:, call.shape.latent.rank :]


def keys_values(n: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
    """[C, H] -> [C, heads, D] and [C, heads, Dv]."""
    shape = call.shape
    assert shape.latent is not None
    narrow, shared = _narrow(n, call)
    both = linear(normed(narrow, call, "kv_a_norm"), call, "kv_b")
    both = both.view(n.shape[0], shape.heads, shape.latent.plain + shape.value_dim)
    k = n.new_empty(n.shape[0], shape.heads, shape.head_dim)
    k[..., : shape.latent.plain] = both[..., : shape.latent.plain]
    k[..., shape.latent.plain :] = shared[:, None]
    return k, both[..., shape.latent.plain :]


def projections_backward(
    gq: Tensor, gk: Tensor, gv: Tensor, n: Tensor, call: LayerCall, sums: Sums, dn: Tensor | None
) -> Tensor:
    """The gradient at the projections' input, [C, H], added to `dn` if it is given.

    Args:
        gq, gk, gv: gradients of what `query_heads` and `keys_values` give.
    """
    latent = call.shape.latent
    assert latent is not None
    gq = gq.flatten(1)
    if latent.query_rank:
        before = linear(n, call, "q_a")
        g = through(gq, normed(before, call, "q_a_norm"), call, "q_b", sums)
        g = normed_backward(g, before, call, "q_a_norm", sums)
        dn = through(g, n, call, "q_a", sums, dn)
    else:
        dn = through(gq, n, call, "q", sums, dn)
    narrow, _ = _narrow(n, call)
    both = torch.cat((gk[..., : latent.plain], gv), -1).flatten(1)
    g = through(both, normed(narrow, call, "kv_a_norm"), call, "kv_b", sums)
    g = normed_backward(g, narrow, call, "kv_a_norm", sums)
    shared = gk[..., latent.plain :].sum(1, dtype=wide(gk.dtype)).to(gk.dtype)
    return through(torch.cat((g, shared), 1), n, call, "kv_a", sums, dn)
