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


def turned(y: Tensor, s: slice, call: LayerCall, name: str) -> Tensor:
    """Rotary embedding of the tokens `s`, for queries ("q") or keys ("k"), and queries' growth:
    [C, heads, D] -> the same.
    """
    if call.shape.rotary is not None and call.cos is not None and call.sin is not None:
        y = rotate(y, call.cos[s], call.sin[s], call.shape.rotary.pairs, call.shape.rotary.last)
    return y if call.growth is None or name != "q" else y * call.growth[s]


def turned_backward(g: Tensor, s: slice, call: LayerCall, name: str) -> Tensor:
    """The adjoint of `turned`."""
    if call.growth is not None and name == "q":
        g = g * call.growth[s]
    if call.shape.rotary is None or call.cos is None or call.sin is None:
        return g
    return rotate_backward(
        g, call.cos[s], call.sin[s], call.shape.rotary.pairs, call.shape.rotary.last
    )


def _head_rows(call: LayerCall, name: str, heads: slice, part: int = 0) -> tuple[str, Rows]:
    """The linear and its outputs that make some heads of a projection. Where it makes an output
    gate too, the query (part 0) and the gate (part 1) of a head stand beside each other.
    """
    source, rows = call.rows(name)
    dim = call.shape.head_dim
    if name == "q" and call.gate_beside_queries:
        every = torch.arange(2 * call.shape.heads * dim, device=call.weights["q"].device)
        # [heads * 2 * D] -> [heads, 2, D]
        return source, every.view(call.shape.heads, 2, dim)[heads, part].reshape(-1)
    if heads == ALL:
        return source, rows
    start = rows.start or 0
    return source, slice(start + heads.start * dim, start + heads.stop * dim)


def _projected(n: Tensor, call: LayerCall, name: str, heads: slice = ALL) -> Tensor:
    """[C, H] -> [C, heads, D], before norm and rotary embedding."""
    source, rows = _head_rows(call, name, heads)
    return linear(n, call, source, rows).view(n.shape[0], -1, call.shape.head_dim)


def _made(n: Tensor, s: slice, call: LayerCall, name: str, heads: slice = ALL) -> Tensor:
    """[C, H] normed hidden -> [C, heads, D] queries, keys or values."""
    if name != "v" and call.shape.norm_of_turned:
        return normed(turned(_projected(n, call, name, heads), s, call, name), call, f"{name}_norm")
    if name != "v" and call.shape.whole_norm:
        y = normed(_projected(n, call, name).flatten(1), call, f"{name}_norm")
        y = y.view(n.shape[0], -1, call.shape.head_dim)[:, heads]
    else:
        y = _projected(n, call, name, heads)
        if call.before_norm is not None and call.shape.norm(f"{name}_norm") is not None:
            call.before_norm[name] = y
        y = normed(y, call, f"{name}_norm", heads)
    return y if name == "v" else turned(y, s, call, name)


def _made_backward(
    g: Tensor, n: Tensor, s: slice, call: LayerCall, name: str, sums: Sums
) -> Tensor:
    """[C, heads, D] -> the gradient of the projection's output, [C, heads * D]."""
    if name != "v" and call.shape.norm_of_turned:
        y = turned(_projected(n, call, name), s, call, name)
        g = normed_backward(g, y, call, f"{name}_norm", sums)
        return turned_backward(g, s, call, name).flatten(1)
    if name != "v":
        g = turned_backward(g, s, call, name)
    if call.shape.norm(f"{name}_norm") is not None:
        y = None if call.before_norm is None else call.before_norm.pop(name, None)
        if y is None:
            y = _projected(n, call, name)
        if call.shape.whole_norm:
            y, g = y.flatten(1), g.flatten(1)
        g = normed_backward(g, y, call, f"{name}_norm", sums)
    return g.reshape(g.shape[0], -1)


def _whole(
    length: int, call: LayerCall, make: Callable[[slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `make` gives of each chunk, [C, ...], for all tokens; of one chunk without a copy."""
    chunks = list(call.chunks(length))
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


def queries(x: Tensor, call: LayerCall, heads: slice) -> Tensor:
    """[T, H] -> [T, heads, D] queries of some heads."""

    def make(s: slice) -> tuple[Tensor]:
        n = normed(x[s], call, "norm1")
        if call.shape.latent is not None:
            return (turned(latent.query_heads(n, call, heads), s, call, "q"),)
        return (_made(n, s, call, "q", heads),)

    return _whole(x.shape[0], call, make)[0]


def keys_values(x: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
    """[T, H] -> keys [T, key heads, D] and values [T, key heads, Dv]."""

    def make(s: slice) -> tuple[Tensor, Tensor]:
        n = normed(x[s], call, "norm1")
        if call.shape.latent is not None:
            k, v = latent.keys_values(n, call)
            return turned(k, s, call, "k"), v
        return _made(n, s, call, "k"), _made(n, s, call, "v")

    k, v = _whole(x.shape[0], call, make)
    return k, v


def attention(x: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
    """out [T, heads, Dv], contiguous, and its log-sum-exp, a group of heads at a time."""
    if call.groups == 1:
        q = queries(x, call, ALL)
        out, lse = sp.attention_forward(q, k, v, call.plan, **call.options, **call.sinks(ALL))
        # kernels that know one head dim give part of a wider tensor (latent attention)
        return out.contiguous(), lse
    out, lses = x.new_empty(x.shape[0], call.shape.heads, call.shape.value_dim), []
    for mine, keys in call.group_slices():
        kg, vg = k[:, keys].contiguous(), v[:, keys].contiguous()
        q = queries(x, call, mine)
        out[:, mine], lse = sp.attention_forward(
            q, kg, vg, call.plan, **call.options, **call.sinks(mine)
        )
        lses.append(lse)
    return out, torch.cat(lses)


def gate_of(x: Tensor, s: slice, call: LayerCall, heads: slice = ALL) -> Tensor:
    """[C, heads, D or 1]: the output gate of the tokens `s`, for some heads."""
    n = normed(x[s], call, "norm1")
    if call.gate_beside_queries:
        made = linear(n, call, *_head_rows(call, "q", heads, 1))
        return made.view(n.shape[0], -1, call.shape.head_dim)
    each = call.width("g") // call.shape.heads
    made = linear(n, call, "g", columns_of(heads, each))
    return made.view(n.shape[0], -1, each)


def attended(x: Tensor, out: Tensor, s: slice, call: LayerCall) -> Tensor:
    """What the output projection gets of the tokens `s`: [C, heads * Dv]."""
    if call.shape.output_gate is None:
        return out[s]
    by_head = out[s].unflatten(1, (call.shape.heads, -1))
    return output_gated(by_head, gate_of(x, s, call), call.shape.output_gate).flatten(1)


def _ungated(
    x: Tensor, out: Tensor, da: Tensor, dgate: Tensor | None, call: LayerCall, heads: slice
) -> Tensor:
    """The gradient of attention's output for some heads, [T, heads, Dv]; and into `dgate` that of
    their gates, where there are some.
    """
    dim = call.shape.value_dim
    columns = columns_of(heads, dim)
    if dgate is None:
        return linear_backward(da, call, "o", columns=columns)[0].unflatten(1, (-1, dim))
    count = len(range(call.shape.heads)[heads])
    dout = x.new_empty(x.shape[0], count, dim)
    for s in call.chunks(x.shape[0]):
        g = linear_backward(da[s], call, "o", columns=columns)[0].unflatten(1, (-1, dim))
        of_heads = out[s, columns].unflatten(1, (-1, dim))
        gate = gate_of(x, s, call, heads)
        dout[s], dgate[s, heads] = output_gated_backward(g, of_heads, gate, call.shape.output_gate)
    return dout


def attention_backward(
    x: Tensor,
    out: Tensor,
    lse: Tensor,
    da: Tensor,
    k: Tensor,
    v: Tensor,
    call: LayerCall,
    sums: Sums,
) -> tuple[Tensor, KeyGradients, Tensor | None]:
    """The gradients of queries [T, heads, D] (with several groups of heads as wide as values:
    written over out), of keys and values, and of the output gate [T, heads, D or 1], where there is
    one.

    Args:
        out: [T, heads * Dv].
        da: gradient of the output projection, [T, H].
    """
    T, shape = x.shape[0], call.shape
    dgate = None
    if shape.output_gate is not None:
        numbers = shape.heads * shape.head_dim if call.gate_beside_queries else call.width("g")
        dgate = x.new_empty(T, shape.heads, numbers // shape.heads)
    whole = out.view(T, shape.heads, shape.value_dim)
    if call.groups == 1:
        dout = _ungated(x, out, da, dgate, call, ALL)
        q = queries(x, call, ALL)
        dq, of_keys, dsinks = sp.attention_backward_in_parts(
            dout, q, k, v, whole, lse, call.plan, **call.options, **call.sinks(ALL)
        )
        sums.add("sinks", dsinks)
        return dq, of_keys, dgate
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dqs = whole
    if shape.value_dim != shape.head_dim:
        dqs = x.new_empty(T, shape.heads, shape.head_dim)
    all_sinks: list[Any] = []
    for mine, keys in call.group_slices():
        dout = _ungated(x, out, da, dgate, call, mine)
        kg, vg, og, lg = (
            k[:, keys].contiguous(),
            v[:, keys].contiguous(),
            whole[:, mine].contiguous(),
            lse[mine].contiguous(),
        )
        q = queries(x, call, mine)
        dq, dkg, dvg, dsinks = sp.attention_backward(
            dout, q, kg, vg, og, lg, call.plan, **call.options, **call.sinks(mine)
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
    call: LayerCall,
    sums: Sums,
) -> None:
    """dx += gradient through the norm and the projections.

    Args:
        pending: [T, H] of a parallel layer: the gradient that the norm's output has from the MLP.
    """
    of_keys = functools.cache(of_keys)  # in the first chunk: what needs dq alone comes before
    for s in call.chunks(x.shape[0]):
        n = normed(x[s], call, "norm1")
        dn = None if pending is None else pending[s]
        if call.shape.latent is not None:
            gq = turned_backward(dq[s], s, call, "q")
            dk, dv = of_keys()
            gk = turned_backward(dk[s], s, call, "k")
            dn = latent.projections_backward(gq, gk, dv[s], n, call, sums, dn)
        else:
            dn = _plain_backward(dq[s], of_keys, dgate, n, s, call, sums, dn)
        if dgate is not None and not call.gate_beside_queries:
            dn = through(dgate[s].flatten(1), n, call, "g", sums, dn)
        dx[s] = normed_backward(dn, x[s], call, "norm1", sums, dx[s])


def _plain_backward(
    dq: Tensor,
    of_keys: KeyGradients,
    dgate: Tensor | None,
    n: Tensor,
    s: slice,
    call: LayerCall,
    sums: Sums,
    dn: Tensor | None,
) -> Tensor:
    """The gradient at the projections' input, [C, H], added to `dn` if it is given."""
    gq = _made_backward(dq, n, s, call, "q", sums)
    if dgate is not None and call.gate_beside_queries:
        # [C, heads, D] twice -> [C, heads, 2, D] -> [C, heads * 2 * D]
        gq = torch.stack((gq.view(dgate[s].shape), dgate[s]), 2).flatten(1)
    packed = call.rows("q")[0] == "qkv"
    if not packed:
        dn = through(gq, n, call, "q", sums, dn)
    dk, dv = of_keys()
    gk = _made_backward(dk[s], n, s, call, "k", sums)
    gv = _made_backward(dv[s], n, s, call, "v", sums)
    if packed:
        return through(torch.cat((gq, gk, gv), 1), n, call, "qkv", sums, dn)
    if call.rows("v")[0] == "k":
        return through(gk + gv, n, call, "k", sums, dn)
    dn = through(gk, n, call, "k", sums, dn)
    return through(gv, n, call, "v", sums, dn)
