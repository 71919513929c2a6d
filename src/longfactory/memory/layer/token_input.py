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


def with_token_input(z: Tensor, s: slice, call: LayerCall) -> Tensor:
    """y of the tokens `s`: [C, H] -> [C, H]."""
    assert call.token_input is not None and call.shape.token_input is not None
    gate = linear(z, call, "input_gate")
    made = linear(gated(gate, call.token_input[s], call.shape.token_input), call, "input_up")
    return z + normed(made, call, "input_norm")


def token_input_backward(dy: Tensor, z: Tensor, s: slice, call: LayerCall, sums: Sums) -> Tensor:
    """The gradient at z, [C, H]; and that at p, into the call's `token_gradient`."""
    assert call.token_input is not None and call.shape.token_input is not None
    gate, p = linear(z, call, "input_gate"), call.token_input[s]
    made = linear(gated(gate, p, call.shape.token_input), call, "input_up")
    dm = normed_backward(dy, made, call, "input_norm", sums)
    dhidden, gb = linear_backward(dm, call, "input_up")
    hidden, dgate, dp = gated_backward(dhidden, gate, p, call.shape.token_input)
    sums.outer("input_up", dm, hidden, gb, made)
    if call.token_gradient is not None:
        call.token_gradient[s] = dp
    return dy + through(dgate, z, call, "input_gate", sums, made=gate)
