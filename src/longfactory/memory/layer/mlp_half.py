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


def mlp_forward(x: Tensor, out: Tensor, y: Tensor, s: slice, call: LayerCall) -> None:
    """y[s] := what the layer gives for the tokens `s`.

    Args:
        out: attention's, [T, heads * Dv].
    """
    into = {} if call.products is None else saved_rows(call.products, s)
    x2 = _after_attention(
        x, linear(attended(x, out, s, call), call, "o", out=into.get("o")), s, call
    )
    n = _mlp_input(x, x2, s, call)
    if call.mlp is not None:
        m = _module_forward(n, s, call)
    else:
        assert call.shape.activation is not None
        gate, up = _gate_up(n, call, into)
        m = linear(gated(gate, up, call.shape.activation), call, "down")
    if call.token_input is None:
        torch.add(x2, normed(m, call, "norm2_after"), alpha=call.shape.residual, out=y[s])
    else:
        y[s] = with_token_input(_after_mlp(x2, m, call), s, call)


def _after_attention(x: Tensor, a: Tensor, s: slice, call: LayerCall) -> Tensor:
    """x2 of the tokens `s`, from what the output projection gives: [C, H] both."""
    return torch.add(x[s], normed(a, call, "norm1_after"), alpha=call.shape.residual)


def _after_mlp(x2: Tensor, m: Tensor, call: LayerCall) -> Tensor:
    """What the layer gives but for a token's input, from x2 and what the MLP gives: [C, H]."""
    return torch.add(x2, normed(m, call, "norm2_after"), alpha=call.shape.residual)


def _mlp_input(x: Tensor, x2: Tensor, s: slice, call: LayerCall) -> Tensor:
    return normed(x[s], call, "norm1") if call.shape.parallel else normed(x2, call, "norm2")


def saved_rows(products: dict[str, Tensor], s: slice) -> dict[str, Tensor]:
    """Saved products of the tokens `s`."""
    return {name: product[s] for name, product in products.items()}


def room_for_products(x: Tensor, call: LayerCall) -> dict[str, Tensor]:
    """For what the output projection, gate and up give for all tokens, but for those that the layer
    has not, or that backward does not ask for.
    """
    names = [name for name in ("gate_up", "gate", "up") if name in call.weights]
    if not call.shape.parallel:
        names.append("o")
    return {name: x.new_empty(x.shape[0], call.width(name)) for name in names}


def _gate_up(n: Tensor, call: LayerCall, into: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What gate and up give, written to `into` where it has room for that."""
    if "gate_up" not in call.weights:
        gate, up = (linear(n, call, name, out=into.get(name)) for name in ("gate", "up"))
        return gate, up
    return _halves(linear(n, call, "gate_up", out=into.get("gate_up")))


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
    call: LayerCall,
    sums: Sums,
) -> None:
    """dx2 := gradient at x2; da := that at the output projection; `pending` := that at the norm's
    output, of a parallel layer. dx2 may be dy itself, and da dx2.

    Args:
        out: attention's, [T, heads * Dv]. All others: [T, H].
    """
    for s in call.chunks(x.shape[0]):
        given = attended(x, out, s, call)
        a = None if call.products is None else saved_rows(call.products, s).get("o")
        x2 = x[s]
        if not call.shape.parallel:
            a = linear(given, call, "o") if a is None else a
            x2 = _after_attention(x, a, s, call)
        slope = dy[s] if call.scalar is None else dy[s] * call.scalar
        run = _again(x, x2, s, call)
        if call.token_input is not None:
            z = _after_mlp(x2, run["made"].detach(), call)
            slope = token_input_backward(slope, z, s, call, sums)
            del z
        g = slope if call.shape.residual == 1.0 else slope * call.shape.residual
        dn = (
            _gated_backward(g, run, call, sums)
            if call.mlp is None
            else _module_backward(g, run, call, sums)
        )
        if pending is not None:
            pending[s], dx2[s] = dn, slope
        else:
            dx2[s] = normed_backward(dn, x2, call, "norm2", sums, slope)
        del dn, x2, slope, g, run
        if call.shape.separate_gradient:
            g = dx2[s] if call.shape.residual == 1.0 else dx2[s] * call.shape.residual
            da[s] = g if a is None else normed_backward(g, a, call, "norm1_after", sums)
        sums.outer("o", da[s], given, low_gradient(da[s], call, "o"), a)


def _again(x: Tensor, x2: Tensor, s: slice, call: LayerCall) -> dict[str, Tensor]:
    """What the MLP is given ("n") and what it makes of that ("made"), for the tokens `s`, as
    backward needs them: of a gated MLP "gate" and "up" too, and "made" where something follows it;
    of a module with a graph.
    """
    if call.mlp is not None:
        kept = None if call.kept is None else call.kept.pop(s.start)
        n, made = kept or _differentiable(_mlp_input(x, x2, s, call), s, call)
        return {"n": n, "made": made}
    n = _mlp_input(x, x2, s, call)
    gate, up = _gate_up(n, call, {}) if call.products is None else _saved(call.products, s)
    run = {"n": n, "gate": gate, "up": up}
    if call.token_input is not None or call.shape.norm("norm2_after") is not None:
        assert call.shape.activation is not None
        run["made"] = linear(gated(gate, up, call.shape.activation), call, "down")
    return run


def _gated_backward(dm: Tensor, run: dict[str, Tensor], call: LayerCall, sums: Sums) -> Tensor:
    """The gradient at the MLP's input, from that of what its norm gives. [C, H]

    Args:
        run: of `_again`; emptied, so that each tensor is gone where it is needed no more.
    """
    n, gate, up, made = (run.pop(name, None) for name in ("n", "gate", "up", "made"))
    assert call.shape.activation is not None and n is not None
    if made is not None:
        dm = normed_backward(dm, made, call, "norm2_after", sums)
    if call.factor("down") is None:
        made = None
    dhidden, gb = linear_backward(dm, call, "down")
    hidden, dgate, dup = gated_backward(dhidden, gate, up, call.shape.activation)
    del dhidden
    if not any(call.factor(name) is not None for name in ("gate", "up", "gate_up")):
        gate = up = None
    sums.outer("down", dm, hidden, gb, made)
    del hidden, made
    if "gate_up" in call.weights:
        both = None if gate is None else torch.cat((gate, up), 1)
        return through(torch.cat((dgate, dup), 1), n, call, "gate_up", sums, made=both)
    dn = through(dgate, n, call, "gate", sums, made=gate)
    del dgate, gate
    return through(dup, n, call, "up", sums, dn, up)


def _module_forward(n: Tensor, s: slice, call: LayerCall) -> Tensor:
    """Through a module of its own: without a graph, or with the one that backward will need."""
    if call.kept is None:
        return call.mlp(n, s.start)  # type: ignore[no-any-return]
    call.kept[s.start] = _differentiable(n, s, call)
    return call.kept[s.start][1].detach()


def _differentiable(n: Tensor, s: slice, call: LayerCall) -> tuple[Tensor, Tensor]:
    """What the module is given, and what it makes of that: with a graph."""
    with torch.enable_grad():
        given = n.detach().requires_grad_()
        return given, call.mlp(given, s.start)


def _module_backward(dm: Tensor, run: dict[str, Tensor], call: LayerCall, sums: Sums) -> Tensor:
    """The same through a module of its own, which autograd differentiates."""
    n, made = run.pop("n"), run.pop("made")
    weights = list(call.mlp_weights())
    dm = normed_backward(dm, made.detach(), call, "norm2_after", sums)
    dn, *gradients = torch.autograd.grad(made, [n, *weights], dm, allow_unused=True)
    for place, g in enumerate(gradients):
        sums.add(mlp_name(place), g)
    return dn
