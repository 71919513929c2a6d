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


def query_heads(n: Tensor, c: LayerCall, heads: slice) -> Tensor:
    """[C, H] -> [C, heads, D] of some heads."""
    dim = c.shape.head_dim
    rows = columns_of(heads, dim)
    if c.shape.latent is not None and c.shape.latent.query_rank:
        narrow = normed(linear(n, c, "q_a"), c, "q_a_norm")
        return linear(narrow, c, "q_b", rows).view(n.shape[0], -1, dim)
    return linear(n, c, "q", rows).view(n.shape[0], -1, dim)


def _narrow(n: Tensor, c: LayerCall) -> tuple[Tensor, Tensor]:
    """[C, rank] before its norm, and the shared part of keys, [C, R]."""
    assert c.shape.latent is not None
    made = linear(n, c, "kv_a")
    return made[:, : c.shape.latent.rank], made[:, c.shape.latent.rank :]


def keys_values(n: Tensor, c: LayerCall) -> tuple[Tensor, Tensor]:
    """[C, H] -> [C, heads, D] and [C, heads, Dv]."""
    shape = c.shape
    assert shape.latent is not None
    narrow, shared = _narrow(n, c)
    both = linear(normed(narrow, c, "kv_a_norm"), c, "kv_b")
    both = both.view(n.shape[0], shape.heads, shape.latent.plain + shape.value_dim)
    k = n.new_empty(n.shape[0], shape.heads, shape.head_dim)
    k[..., : shape.latent.plain] = both[..., : shape.latent.plain]
    k[..., shape.latent.plain :] = shared[:, None]
    return k, both[..., shape.latent.plain :]


def projections_backward(
    gq: Tensor, gk: Tensor, gv: Tensor, n: Tensor, c: LayerCall, sums: Sums, dn: Tensor | None
) -> Tensor:
    """The gradient at the projections' input, [C, H], added to `dn` if it is given.

    Args:
        gq, gk, gv: gradients of what `query_heads` and `keys_values` give.
    """
    latent = c.shape.latent
    assert latent is not None
    gq = gq.flatten(1)
    if latent.query_rank:
        before = linear(n, c, "q_a")
        g = through(gq, normed(before, c, "q_a_norm"), c, "q_b", sums)
        g = normed_backward(g, before, c, "q_a_norm", sums)
        dn = through(g, n, c, "q_a", sums, dn)
    else:
        dn = through(gq, n, c, "q", sums, dn)
    narrow, _ = _narrow(n, c)
    both = torch.cat((gk[..., : latent.plain], gv), -1).flatten(1)
    g = through(both, normed(narrow, c, "kv_a_norm"), c, "kv_b", sums)
    g = normed_backward(g, narrow, c, "kv_a_norm", sums)
    shared = gk[..., latent.plain :].sum(1, dtype=wide(gk.dtype)).to(gk.dtype)
    return through(torch.cat((g, shared), 1), n, c, "kv_a", sums, dn)
