"""What comes after attention in the hand-written layer: output projection, norms, MLP, residuals,
and their backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longfactory.memory.layer.attention_half import attended
from longfactory.memory.layer.linears import (
    LayerCall,
    Sums,
    linear,
    linear_backward,
    low_gradient,
    mlp_name,
    normed,
    normed_backward,
    through,
)
from longfactory.memory.layer.token_input import token_input_backward, with_token_input
from longfactory.memory.layer_ops import gated, gated_backward


def mlp_forward(x: Tensor, out: Tensor, y: Tensor, s: slice, c: LayerCall) -> None:
    """y[s] := what the layer gives for the tokens `s`.

    Args:
        out: attention's, [T, heads * Dv].
    """
    into = {} if c.products is None else saved_rows(c.products, s)
    x2 = _after_attention(x, linear(attended(x, out, s, c), c, "o", out=into.get("o")), s, c)
    n = _mlp_input(x, x2, s, c)
    if c.mlp is not None:
        m = _module_forward(n, s, c)
    else:
        assert c.shape.activation is not None
        gate, up = _gate_up(n, c, into)
        m = linear(gated(gate, up, c.shape.activation), c, "down")
    if c.token_input is None:
        torch.add(x2, normed(m, c, "norm2_after"), alpha=c.shape.residual, out=y[s])
    else:
        y[s] = with_token_input(_after_mlp(x2, m, c), s, c)


def _after_attention(x: Tensor, a: Tensor, s: slice, c: LayerCall) -> Tensor:
    """x2 of the tokens `s`, from what the output projection gives: [C, H] both."""
    return torch.add(x[s], normed(a, c, "norm1_after"), alpha=c.shape.residual)


def _after_mlp(x2: Tensor, m: Tensor, c: LayerCall) -> Tensor:
    """What the layer gives but for a token's input, from x2 and what the MLP gives: [C, H]."""
    return torch.add(x2, normed(m, c, "norm2_after"), alpha=c.shape.residual)


def _mlp_input(x: Tensor, x2: Tensor, s: slice, c: LayerCall) -> Tensor:
    return normed(x[s], c, "norm1") if c.shape.parallel else normed(x2, c, "norm2")


def saved_rows(products: dict[str, Tensor], s: slice) -> dict[str, Tensor]:
    """Saved products of the tokens `s`."""
    return {name: product[s] for name, product in products.items()}


def room_for_products(x: Tensor, c: LayerCall) -> dict[str, Tensor]:
    """For what the output projection, gate and up give for all tokens, but for those that the layer
    has not, or that backward does not ask for.
    """
    names = [name for name in ("gate_up", "gate", "up") if name in c.weights]
    if not c.shape.parallel:
        names.append("o")
    return {name: x.new_empty(x.shape[0], c.width(name)) for name in names}


def _gate_up(n: Tensor, c: LayerCall, into: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What gate and up give, written to `into` where it has room for that."""
    if "gate_up" not in c.weights:
        gate, up = (linear(n, c, name, out=into.get(name)) for name in ("gate", "up"))
        return gate, up
    return _halves(linear(n, c, "gate_up", out=into.get("gate_up")))


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = both.chunk(2, -1)
    return gate, up


def _saved(products: dict[str, Tensor], s: slice) -> tuple[Tensor, Tensor]:
    rows = saved_rows(products, s)
    return _halves(rows["gate_up"]) if "gate_up" in rows else (rows["gate"], rows["up"])


def mlp_backward(
    x: Tensor,
    out: Tensor,
    dy: Tensor,
    dx2: Tensor,
    da: Tensor,
    pending: Tensor | None,
    c: LayerCall,
    sums: Sums,
) -> None:
    """dx2 := gradient at x2; da := that at the output projection; `pending` := that at the norm's
    output, of a parallel layer. dx2 may be dy itself, and da dx2.

    Args:
        out: attention's, [T, heads * Dv]. All others: [T, H].
    """
    for s in c.chunks(x.shape[0]):
        given = attended(x, out, s, c)
        a = None if c.products is None else saved_rows(c.products, s).get("o")
        x2 = x[s]
        if not c.shape.parallel:
            a = linear(given, c, "o") if a is None else a
            x2 = _after_attention(x, a, s, c)
        slope = dy[s] if c.scalar is None else dy[s] * c.scalar
        run = _again(x, x2, s, c)
        if c.token_input is not None:
            z = _after_mlp(x2, run["made"].detach(), c)
            slope = token_input_backward(slope, z, s, c, sums)
            del z
        g = slope if c.shape.residual == 1.0 else slope * c.shape.residual
        dn = (
            _gated_backward(g, run, c, sums) if c.mlp is None else _module_backward(g, run, c, sums)
        )
        if pending is not None:
            pending[s], dx2[s] = dn, slope
        else:
            dx2[s] = normed_backward(dn, x2, c, "norm2", sums, slope)
        del dn, x2, slope, g, run
        if c.shape.separate_gradient:
            g = dx2[s] if c.shape.residual == 1.0 else dx2[s] * c.shape.residual
            da[s] = g if a is None else normed_backward(g, a, c, "norm1_after", sums)
        sums.outer("o", da[s], given, low_gradient(da[s], c, "o"), a)


def _again(x: Tensor, x2: Tensor, s: slice, c: LayerCall) -> dict[str, Tensor]:
    """What the MLP is given ("n") and what it makes of that ("made"), for the tokens `s`, as
    backward needs them: of a gated MLP "gate" and "up" too, and "made" where something follows it;
    of a module with a graph.
    """
    if c.mlp is not None:
        kept = None if c.kept is None else c.kept.pop(s.start)
        n, made = kept or _differentiable(_mlp_input(x, x2, s, c), s, c)
        return {"n": n, "made": made}
    n = _mlp_input(x, x2, s, c)
    gate, up = _gate_up(n, c, {}) if c.products is None else _saved(c.products, s)
    run = {"n": n, "gate": gate, "up": up}
    if c.token_input is not None or c.shape.norm("norm2_after") is not None:
        assert c.shape.activation is not None
        run["made"] = linear(gated(gate, up, c.shape.activation), c, "down")
    return run


def _gated_backward(dm: Tensor, run: dict[str, Tensor], c: LayerCall, sums: Sums) -> Tensor:
    """The gradient at the MLP's input, from that of what its norm gives. [C, H]

    Args:
        run: of `_again`; emptied, so that each tensor is gone where it is needed no more.
    """
    n, gate, up, made = (run.pop(name, None) for name in ("n", "gate", "up", "made"))
    assert c.shape.activation is not None and n is not None
    if made is not None:
        dm = normed_backward(dm, made, c, "norm2_after", sums)
    if c.factor("down") is None:
        made = None
    dhidden, gb = linear_backward(dm, c, "down")
    hidden, dgate, dup = gated_backward(dhidden, gate, up, c.shape.activation)
    del dhidden
    if not any(c.factor(name) is not None for name in ("gate", "up", "gate_up")):
        gate = up = None
    sums.outer("down", dm, hidden, gb, made)
    del hidden, made
    if "gate_up" in c.weights:
        both = None if gate is None else torch.cat((gate, up), 1)
        return through(torch.cat((dgate, dup), 1), n, c, "gate_up", sums, made=both)
    dn = through(dgate, n, c, "gate", sums, made=gate)
    del dgate, gate
    return through(dup, n, c, "up", sums, dn, up)


def _module_forward(n: Tensor, s: slice, c: LayerCall) -> Tensor:
    """Through a module of its own: without a graph, or with the one that backward will need."""
    if c.kept is None:
        return c.mlp(n, s.start)  # type: ignore[no-any-return]
    c.kept[s.start] = _differentiable(n, s, c)
    return c.kept[s.start][1].detach()


def _differentiable(n: Tensor, s: slice, c: LayerCall) -> tuple[Tensor, Tensor]:
    """What the module is given, and what it makes of that: with a graph."""
    with torch.enable_grad():
        given = n.detach().requires_grad_()
        return given, c.mlp(given, s.start)


def _module_backward(dm: Tensor, run: dict[str, Tensor], c: LayerCall, sums: Sums) -> Tensor:
    """The same through a module of its own, which autograd differentiates."""
    n, made = run.pop("n"), run.pop("made")
    weights = list(c.mlp_weights())
    dm = normed_backward(dm, made.detach(), c, "norm2_after", sums)
    dn, *gradients = torch.autograd.grad(made, [n, *weights], dm, allow_unused=True)
    for place, g in enumerate(gradients):
        sums.add(mlp_name(place), g)
    return dn
