"""An input of its own that a layer has for each token (Gemma 4), p [T, P], behind the MLP:

    y = z + norm(Wp (activation(Wg z) * p))

and its backward.
"""

from __future__ import annotations

from torch import Tensor

from longfactory.memory.layer.linears import (
    LayerCall,
    Sums,
    linear,
    linear_backward,
    normed,
    normed_backward,
    through,
)
from longfactory.memory.layer_ops import gated, gated_backward


def with_token_input(z: Tensor, s: slice, c: LayerCall) -> Tensor:
    """y of the tokens `s`: [C, H] -> [C, H]."""
    assert c.token_input is not None and c.shape.token_input is not None
    gate = linear(z, c, "input_gate")
    made = linear(gated(gate, c.token_input[s], c.shape.token_input), c, "input_up")
    return z + normed(made, c, "input_norm")


def token_input_backward(dy: Tensor, z: Tensor, s: slice, c: LayerCall, sums: Sums) -> Tensor:
    """The gradient at z, [C, H]; and that at p, into the call's `token_gradient`."""
    assert c.token_input is not None and c.shape.token_input is not None
    gate, p = linear(z, c, "input_gate"), c.token_input[s]
    made = linear(gated(gate, p, c.shape.token_input), c, "input_up")
    dm = normed_backward(dy, made, c, "input_norm", sums)
    dhidden, gb = linear_backward(dm, c, "input_up")
    hidden, dgate, dp = gated_backward(dhidden, gate, p, c.shape.token_input)
    sums.outer("input_up", dm, hidden, gb, made)
    if c.token_gradient is not None:
        c.token_gradient[s] = dp
    return dy + through(dgate, z, c, "input_gate", sums, made=gate)
