"""Queries, keys and values of the hand-written layer, attention, and their backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfactory import sp
from longfactory.memory.layer import latent
from longfactory.memory.layer.linears import (
    ALL,
    LayerCall,
    Rows,
    Sums,
    columns_of,
    linear,
    linear_backward,
    normed,
    normed_backward,
    through,
)
from longfactory.memory.layer_ops import (
    output_gated,
    output_gated_backward,
    rotate,
    rotate_backward,
)
from longfactory.sp.kernels import KeyGradients


def turned(y: Tensor, s: slice, c: LayerCall, name: str) -> Tensor:
    """Rotary embedding of the tokens `s`, for queries ("q") or keys ("k"), and queries' growth:
    [C, heads, D] -> the same.
    """
    if c.shape.rotary is not None and c.cos is not None and c.sin is not None:
        y = rotate(y, c.cos[s], c.sin[s], c.shape.rotary.pairs, c.shape.rotary.last)
    return y if c.growth is None or name != "q" else y * c.growth[s]


def turned_backward(g: Tensor, s: slice, c: LayerCall, name: str) -> Tensor:
    """The adjoint of `turned`."""
    if c.growth is not None and name == "q":
        g = g * c.growth[s]
    if c.shape.rotary is None or c.cos is None or c.sin is None:
        return g
    return rotate_backward(g, c.cos[s], c.sin[s], c.shape.rotary.pairs, c.shape.rotary.last)


def _head_rows(c: LayerCall, name: str, heads: slice, part: int = 0) -> tuple[str, Rows]:
    """The linear and its outputs that make some heads of a projection. Where it makes an output
    gate too, the query (part 0) and the gate (part 1) of a head stand beside each other.
    """
    source, rows = c.rows(name)
    dim = c.shape.head_dim
    if name == "q" and c.gate_beside_queries:
        every = torch.arange(2 * c.shape.heads * dim, device=c.weights["q"].device)
        # [heads * 2 * D] -> [heads, 2, D]
        return source, every.view(c.shape.heads, 2, dim)[heads, part].reshape(-1)
    if heads == ALL:
        return source, rows
    start = rows.start or 0
    return source, slice(start + heads.start * dim, start + heads.stop * dim)


def _projected(n: Tensor, c: LayerCall, name: str, heads: slice = ALL) -> Tensor:
    """[C, H] -> [C, heads, D], before norm and rotary embedding."""
    source, rows = _head_rows(c, name, heads)
    return linear(n, c, source, rows).view(n.shape[0], -1, c.shape.head_dim)


def _made(n: Tensor, s: slice, c: LayerCall, name: str, heads: slice = ALL) -> Tensor:
    """[C, H] normed hidden -> [C, heads, D] queries, keys or values."""
    if name != "v" and c.shape.norm_of_turned:
        return normed(turned(_projected(n, c, name, heads), s, c, name), c, f"{name}_norm")
    if name != "v" and c.shape.whole_norm:
        y = normed(_projected(n, c, name).flatten(1), c, f"{name}_norm")
        y = y.view(n.shape[0], -1, c.shape.head_dim)[:, heads]
    else:
        y = _projected(n, c, name, heads)
        if c.before_norm is not None and c.shape.norm(f"{name}_norm") is not None:
            c.before_norm[name] = y
        y = normed(y, c, f"{name}_norm", heads)
    return y if name == "v" else turned(y, s, c, name)


def _made_backward(g: Tensor, n: Tensor, s: slice, c: LayerCall, name: str, sums: Sums) -> Tensor:
    """[C, heads, D] -> the gradient of the projection's output, [C, heads * D]."""
    if name != "v" and c.shape.norm_of_turned:
        y = turned(_projected(n, c, name), s, c, name)
        g = normed_backward(g, y, c, f"{name}_norm", sums)
        return turned_backward(g, s, c, name).flatten(1)
    if name != "v":
        g = turned_backward(g, s, c, name)
    if c.shape.norm(f"{name}_norm") is not None:
        y = None if c.before_norm is None else c.before_norm.pop(name, None)
        if y is None:
            y = _projected(n, c, name)
        if c.shape.whole_norm:
            y, g = y.flatten(1), g.flatten(1)
        g = normed_backward(g, y, c, f"{name}_norm", sums)
    return g.reshape(g.shape[0], -1)


def _whole(
    length: int, c: LayerCall, make: Callable[[slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `make` gives of each chunk, [C, ...], for all tokens; of one chunk without a copy."""
    chunks = list(c.chunks(length))
    if len(chunks) == 1:
        return tuple(part.contiguous() for part in make(chunks[0]))
    whole: tuple[Tensor, ...] = ()
    for s in chunks:
        parts = make(s)
        whole = whole or tuple(part.new_empty(length, *part.shape[1:]) for part in parts)
        for all_tokens, part in zip(whole, parts, strict=True):
            all_tokens[s] = part
        del parts, part
    return whole


def queries(x: Tensor, c: LayerCall, heads: slice) -> Tensor:
    """[T, H] -> [T, heads, D] queries of some heads."""

    def make(s: slice) -> tuple[Tensor]:
        n = normed(x[s], c, "norm1")
        if c.shape.latent is not None:
            return (turned(latent.query_heads(n, c, heads), s, c, "q"),)
        return (_made(n, s, c, "q", heads),)

    return _whole(x.shape[0], c, make)[0]


def keys_values(x: Tensor, c: LayerCall) -> tuple[Tensor, Tensor]:
    """[T, H] -> keys [T, key heads, D] and values [T, key heads, Dv]."""

    def make(s: slice) -> tuple[Tensor, Tensor]:
        n = normed(x[s], c, "norm1")
        if c.shape.latent is not None:
            k, v = latent.keys_values(n, c)
            return turned(k, s, c, "k"), v
        return _made(n, s, c, "k"), _made(n, s, c, "v")

    k, v = _whole(x.shape[0], c, make)
    return k, v


def attention(x: Tensor, k: Tensor, v: Tensor, c: LayerCall) -> tuple[Tensor, Tensor]:
    """out [T, heads, Dv], contiguous, and its log-sum-exp, a group of heads at a time."""
    if c.groups == 1:
        q = queries(x, c, ALL)
        out, lse = sp.attention_forward(q, k, v, c.plan, **c.options, **c.sinks(ALL))
        # kernels that know one head dim give part of a wider tensor (latent attention)
        return out.contiguous(), lse
    out, lses = x.new_empty(x.shape[0], c.shape.heads, c.shape.value_dim), []
    for mine, keys in c.group_slices():
        kg, vg = k[:, keys].contiguous(), v[:, keys].contiguous()
        q = queries(x, c, mine)
        out[:, mine], lse = sp.attention_forward(q, kg, vg, c.plan, **c.options, **c.sinks(mine))
        lses.append(lse)
    return out, torch.cat(lses)


def gate_of(x: Tensor, s: slice, c: LayerCall, heads: slice = ALL) -> Tensor:
    """[C, heads, D or 1]: the output gate of the tokens `s`, for some heads."""
    n = normed(x[s], c, "norm1")
    if c.gate_beside_queries:
        made = linear(n, c, *_head_rows(c, "q", heads, 1))
        return made.view(n.shape[0], -1, c.shape.head_dim)
    each = c.width("g") // c.shape.heads
    made = linear(n, c, "g", columns_of(heads, each))
    return made.view(n.shape[0], -1, each)


def attended(x: Tensor, out: Tensor, s: slice, c: LayerCall) -> Tensor:
    """What the output projection gets of the tokens `s`: [C, heads * Dv]."""
    if c.shape.output_gate is None:
        return out[s]
    by_head = out[s].unflatten(1, (c.shape.heads, -1))
    return output_gated(by_head, gate_of(x, s, c), c.shape.output_gate).flatten(1)


def _ungated(
    x: Tensor, out: Tensor, da: Tensor, dgate: Tensor | None, c: LayerCall, heads: slice
) -> Tensor:
    """The gradient of attention's output for some heads, [T, heads, Dv]; and into `dgate` that of
    their gates, where there are some.
    """
    dim = c.shape.value_dim
    columns = columns_of(heads, dim)
    if dgate is None:
        return linear_backward(da, c, "o", columns=columns)[0].unflatten(1, (-1, dim))
    count = len(range(c.shape.heads)[heads])
    dout = x.new_empty(x.shape[0], count, dim)
    for s in c.chunks(x.shape[0]):
        g = linear_backward(da[s], c, "o", columns=columns)[0].unflatten(1, (-1, dim))
        of_heads = out[s, columns].unflatten(1, (-1, dim))
        gate = gate_of(x, s, c, heads)
        dout[s], dgate[s, heads] = output_gated_backward(g, of_heads, gate, c.shape.output_gate)
    return dout


def attention_backward(
    x: Tensor, out: Tensor, lse: Tensor, da: Tensor, k: Tensor, v: Tensor, c: LayerCall, sums: Sums
) -> tuple[Tensor, KeyGradients, Tensor | None]:
    """The gradients of queries [T, heads, D] (with several groups of heads as wide as values:
    written over out), of keys and values, and of the output gate [T, heads, D or 1], where there is
    one.

    Args:
        out: [T, heads * Dv].
        da: gradient of the output projection, [T, H].
    """
    T, shape = x.shape[0], c.shape
    dgate = None
    if shape.output_gate is not None:
        numbers = shape.heads * shape.head_dim if c.gate_beside_queries else c.width("g")
        dgate = x.new_empty(T, shape.heads, numbers // shape.heads)
    whole = out.view(T, shape.heads, shape.value_dim)
    if c.groups == 1:
        dout = _ungated(x, out, da, dgate, c, ALL)
        q = queries(x, c, ALL)
        dq, of_keys, dsinks = sp.attention_backward_in_parts(
            dout, q, k, v, whole, lse, c.plan, **c.options, **c.sinks(ALL)
        )
        sums.add("sinks", dsinks)
        return dq, of_keys, dgate
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dqs = whole
    if shape.value_dim != shape.head_dim:
        dqs = x.new_empty(T, shape.heads, shape.head_dim)
    all_sinks: list[Any] = []
    for mine, keys in c.group_slices():
        dout = _ungated(x, out, da, dgate, c, mine)
        kg, vg, og, lg = (
            k[:, keys].contiguous(),
            v[:, keys].contiguous(),
            whole[:, mine].contiguous(),
            lse[mine].contiguous(),
        )
        q = queries(x, c, mine)
        dq, dkg, dvg, dsinks = sp.attention_backward(
            dout, q, kg, vg, og, lg, c.plan, **c.options, **c.sinks(mine)
        )
        del q, dout, kg, vg, og, lg
        dqs[:, mine], dk[:, keys], dv[:, keys] = dq, dkg, dvg
        all_sinks.append(dsinks)
        del dq, dkg, dvg
    if shape.sinks:
        sums.add("sinks", torch.cat(all_sinks))
    return dqs, lambda: (dk, dv), dgate


def projections_backward(
    x: Tensor,
    dq: Tensor,
    of_keys: KeyGradients,
    dgate: Tensor | None,
    dx: Tensor,
    pending: Tensor | None,
    c: LayerCall,
    sums: Sums,
) -> None:
    """dx += gradient through the norm and the projections.

    Args:
        pending: [T, H] of a parallel layer: the gradient that the norm's output has from the MLP.
    """
    of_keys = functools.cache(of_keys)  # in the first chunk: what needs dq alone comes before
    for s in c.chunks(x.shape[0]):
        n = normed(x[s], c, "norm1")
        dn = None if pending is None else pending[s]
        if c.shape.latent is not None:
            gq = turned_backward(dq[s], s, c, "q")
            dk, dv = of_keys()
            gk = turned_backward(dk[s], s, c, "k")
            dn = latent.projections_backward(gq, gk, dv[s], n, c, sums, dn)
        else:
            dn = _plain_backward(dq[s], of_keys, dgate, n, s, c, sums, dn)
        if dgate is not None and not c.gate_beside_queries:
            dn = through(dgate[s].flatten(1), n, c, "g", sums, dn)
        dx[s] = normed_backward(dn, x[s], c, "norm1", sums, dx[s])


def _plain_backward(
    dq: Tensor,
    of_keys: KeyGradients,
    dgate: Tensor | None,
    n: Tensor,
    s: slice,
    c: LayerCall,
    sums: Sums,
    dn: Tensor | None,
) -> Tensor:
    """The gradient at the projections' input, [C, H], added to `dn` if it is given."""
    gq = _made_backward(dq, n, s, c, "q", sums)
    if dgate is not None and c.gate_beside_queries:
        # [C, heads, D] twice -> [C, heads, 2, D] -> [C, heads * 2 * D]
        gq = torch.stack((gq.view(dgate[s].shape), dgate[s]), 2).flatten(1)
    packed = c.rows("q")[0] == "qkv"
    if not packed:
        dn = through(gq, n, c, "q", sums, dn)
    dk, dv = of_keys()
    gk = _made_backward(dk[s], n, s, c, "k", sums)
    gv = _made_backward(dv[s], n, s, c, "v", sums)
    if packed:
        return through(torch.cat((gq, gk, gv), 1), n, c, "qkv", sums, dn)
    if c.rows("v")[0] == "k":
        return through(gk + gv, n, c, "k", sums, dn)
    dn = through(gk, n, c, "k", sums, dn)
    return through(gv, n, c, "v", sums, dn)
